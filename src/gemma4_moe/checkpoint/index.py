"""The index of a checkpoint of several files, model.safetensors.index.json: which file holds which tensor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.json_scanner import JsonScanner
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_NAME = "model.safetensors.index.json"

#: The longest index that is read, in bytes. The largest published models need about 10 MB.
LONGEST_INDEX = 64 * 2**20

_WEIGHT_MAP = "weight_map"

_DAMAGED = "the index is damaged: get it again, or save the model again with save_pretrained"


def parse_index(raw: bytes, *, file: object) -> dict[str, str]:
    """Return the file name of each tensor. What else the index says (sizes, counts) is published wrong, and ignored.

    Raises:
        CheckpointFormatError: It is not JSON, maps anything but strings to strings, or names something other than a
            safetensors file of its own directory.
        DuplicateTensorError: A tensor has two places.
    """
    scanner = JsonScanner(raw, file=file, what="index")
    seen: set[str] = set()
    weight_map: dict[str, str] = {}
    for key in scanner.members():
        if key in seen:
            raise CheckpointFormatError("the index has one key twice", file=file, found=key, hint=_DAMAGED)
        seen.add(key)
        if key == _WEIGHT_MAP:
            weight_map = _weight_map(scanner)
        else:
            scanner.skip_value()
    scanner.end()
    if not weight_map:
        raise CheckpointFormatError(
            "the index names no tensor", file=file, expected=f'tensors under "{_WEIGHT_MAP}"', hint=_DAMAGED
        )
    return weight_map


def _weight_map(scanner: JsonScanner) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for tensor in scanner.members():
        if tensor in weight_map:
            raise DuplicateTensorError(
                "the index gives one tensor two places", tensor=tensor, file=scanner.file, hint=_DAMAGED
            )
        name = scanner.name()
        if not is_bare_name(name) or not name.endswith(".safetensors"):
            raise CheckpointFormatError(
                "the index names a place outside of its directory, or no safetensors file",
                tensor=tensor,
                file=scanner.file,
                expected="the bare name of a .safetensors file beside the index",
                found=name,
                hint="don't use this checkpoint unless you know who wrote it",
            )
        weight_map[tensor] = name
    return weight_map


def is_bare_name(name: str) -> bool:
    """Say whether `name` can only mean an entry of the directory that it is looked up in."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\\0")


def write_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return an index: the same bytes for the same tensors, whatever order they are given in.

    Args:
        weight_map: The file name of each tensor.
        total_size: Size of all tensors in bytes, headers not counted.
    """
    document = {"metadata": {"total_size": total_size}, _WEIGHT_MAP: dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
