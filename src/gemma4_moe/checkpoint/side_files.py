"""The rule for side files: which files next to the weights a conversion copies, and which it skips.

Copied are files that a model needs to be used, and those that name its authors and license. Code, pickles and other
weights are always skipped.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.impostors import ENOUGH, check_genuine
from gemma4_moe.checkpoint.storage import regular_status, too_large

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


#: Files without which text, images and chats can't be turned into tokens.
TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "*preprocessor_config.json",
    "processor_config.json",
)

PATTERNS = (CONFIG_NAME, "generation_config.json", *TOKENIZER_PATTERNS, "README.md", "LICENSE*", "NOTICE*")

#: Endings of files that are always skipped, whatever the name before them.
NEVER = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".npz",
    ".py",
    ".pyc",
    ".so",
    ".sh",
)

#: The largest side file that is copied, in bytes. The largest real one, a tokenizer, has about 32 MB.
LARGEST_SIDE_FILE = 2**30


def is_side_file(name: str) -> bool:
    """Return whether a file of this name is copied."""
    return _matches(name, PATTERNS)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a side file of this name belongs to the tokenizer, a template or a processor."""
    return _matches(name, TOKENIZER_PATTERNS)


def is_of_macos(name: str) -> bool:
    """Return whether macOS made a file of this name beside a user's own; such files are ignored everywhere."""
    return name.startswith("._") or name == ".DS_Store"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    is_named = any(fnmatchcase(name, pattern) for pattern in patterns)
    return is_named and not name.lower().endswith(NEVER) and not is_of_macos(name)


def side_files_of(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Return the side files among the files of a directory, each checked by `check_side_file`."""
    found = tuple(directory / name for name in names if is_side_file(name))
    for path in found:
        check_side_file(path)
    return found


def check_side_file(path: Path) -> None:
    """Check that `path` names a regular file of at most `LARGEST_SIDE_FILE` bytes, and the file itself."""
    status = regular_status(path)
    if status.st_size > LARGEST_SIDE_FILE:
        raise too_large(path, LARGEST_SIDE_FILE, f"{status.st_size} bytes")
    with OpenFile(path) as file:
        begin = bytearray(min(ENOUGH, status.st_size))
        file.read_into(0, memoryview(begin))
    check_genuine(bytes(begin), path)


MANIFEST_NAME = "gemma4_moe.json"
