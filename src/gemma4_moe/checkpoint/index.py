"""The index of a checkpoint of several files, model.safetensors.index.json: which file holds which tensor."""

from __future__ import annotations

import json
import reprlib
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.strict_json import check_name, load_object, repeated_key
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_NAME = "model.safetensors.index.json"

#: The longest index that is read, in bytes. The largest published models need about 10 MB.
LONGEST_INDEX = 64 * 2**20

_WEIGHT_MAP = "weight_map"

_DAMAGED = "the index is damaged: get it again, or save the model again with save_pretrained"


def parse_index(raw: bytes, *, file: object) -> dict[str, str]:
    """Return the file name of each tensor.

    All else in an index (sizes, counts) is often published wrong, and decides nothing.

    Raises:
        CheckpointFormatError: It is not strict JSON, maps anything but strings to strings, or names something other
            than a safetensors file of its own directory.
        DuplicateTensorError: A tensor has two places.
    """
    members = load_object(raw, file=file, what="index")
    twice = repeated_key(members)
    if twice is not None:
        raise CheckpointFormatError("the index has one key twice", file=file, found=reprlib.repr(twice), hint=_DAMAGED)
    places = dict(members).get(_WEIGHT_MAP)
    if not isinstance(places, tuple) or not places:
        expected, found = f'tensors under "{_WEIGHT_MAP}"', reprlib.repr(places)
        raise CheckpointFormatError(
            "the index names no tensor", file=file, expected=expected, found=found, hint=_DAMAGED
        )
    for tensor, name in places:
        check_name(tensor, file=file)
        _check_place(tensor, name, file)
    twice = repeated_key(places)
    if twice is not None:
        raise DuplicateTensorError("the index gives one tensor two places", tensor=twice, file=file, hint=_DAMAGED)
    return dict(places)


def claimed_size(raw: bytes) -> int | None:
    """Return the `total_size`, in bytes, that an index which `parse_index` has read claims; None if it has none."""
    metadata = json.loads(raw).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if type(size) is int else None


def _check_place(tensor: str, name: object, file: object) -> None:
    if isinstance(name, str):
        check_name(name, file=file)
    if not isinstance(name, str) or not is_bare_name(name) or not name.endswith(".safetensors"):
        raise CheckpointFormatError(
            "the index names a place outside of its directory, or no safetensors file",
            tensor=tensor,
            file=file,
            expected="the bare name of a .safetensors file in the index's directory",
            found=name if isinstance(name, str) else reprlib.repr(name),
            hint="don't use this checkpoint unless you know who wrote it",
        )


def is_bare_name(name: str) -> bool:
    """Return whether `name` can only mean an entry of a directory itself."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\\0")


def write_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return an index: the same bytes for the same tensors, in any order.

    `weight_map` has the file name of each tensor. `total_size` is that of all tensors in bytes, headers not counted.
    """
    document = {"metadata": {"total_size": total_size}, _WEIGHT_MAP: dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
