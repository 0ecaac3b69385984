"""Blocks: they cover every file, ranks share them by whole pages, and each may be made of several parts."""

import random

import pytest

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter import blocks as block_module
from gemma4_moe.converter.blocks import blocks, share
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.target.pieces import gaps
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict

PAGE = 4096


@pytest.fixture(params=[(40, 24), (64, 32)], ids=["odd experts", "experts of whole pages"])
def plan(request, tmp_path):
    H, I = request.param  # noqa: E741
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=3, E=6, H=H, I=I))
    with open_checkpoint(source) as checkpoint:
        return make_plan(checkpoint, max_shard_size=90_000)


@pytest.mark.parametrize("block_bytes", [1, 100, 4096, 10_000, 2**25])
def test_they_cover_every_file_and_are_no_larger_than_one_row_asks(block_bytes, plan, monkeypatch):
    monkeypatch.setattr(block_module, "BLOCK_BYTES", block_bytes)
    found = list(blocks(plan))
    for file in plan.files:
        ranges = [(block.start, block.end) for block in found if block.file == file.name]
        assert gaps([(0, len(file.header)), *ranges], file.size) == []
        assert ranges == sorted(ranges)
    for block in found:
        assert block.end - block.start <= block_bytes or block.last - block.first == 1
        assert sum(read.end - read.start for read in block.reads()) == block.end - block.start, "bf16 on both sides"
        assert len(block.source_extents()) == 1 + (block.tensor.scale is not None)


def pages_of(block):
    return {(block.file, page) for page in range(block.start // PAGE, (block.end - 1) // PAGE + 1)}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_them_and_never_a_page(world, plan, monkeypatch):
    monkeypatch.setattr(block_module, "BLOCK_BYTES", 5000)
    everything = list(blocks(plan))
    dice = random.Random(world)
    for part in (0.0, 0.3, 0.9, 1.0):
        done = {block.place for block in everything if dice.random() < part}
        shares = [share(blocks(plan), done, rank, world) for rank in range(world)]
        assert [block for mine in shares for block in mine] == [b for b in everything if b.place not in done]
        pages = [{page for block in mine for page in pages_of(block)} for mine in shares]
        assert sum(map(len, pages)) == len(set().union(*pages))
