"""Sizes that make a small model large: many files, blocks and journal entries. Imports no torch."""

from gemma4_moe.converter import blocks
from gemma4_moe.target import journal

#: Several weight files, whole pages and odd bytes in each; blocks of one or two experts.
OPTIONS = {"max_shard_size": 25_000, "max_memory": 30_000, "workers": 1}


def shrink():
    """Make blocks and journal entries small."""
    blocks.BLOCK_BYTES = 4096
    journal.FLUSH_BYTES = 8192
