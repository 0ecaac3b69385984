"""The header of a safetensors file before the file exists: where each tensor goes, and the bytes that say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.agreement import file_name
from gemma4_moe.checkpoint.header import LENGTH, LONGEST_HEADER, METADATA_KEY, TensorEntry, tensor_nbytes
from gemma4_moe.checkpoint.readers import PAGE
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError
from gemma4_moe.layout.dtypes import DType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.layout.table import Layout

DEFAULT_SHARD_SIZE = 5 * 10**9

#: The data starts at a multiple of this, and so does each large tensor in it: direct I/O asks for it.
DATA_ALIGNMENT = PAGE

#: Name, dtype and shape of a tensor.
Form = tuple[str, DType, tuple[int, ...]]


def layout_header(
    tensors: Iterable[Form], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Lay out a file: where each tensor goes, and the header that says so.

    Tensors of whole pages come first, larger before smaller, so that each starts at a multiple of `DATA_ALIGNMENT`;
    the others follow by falling element size, so that each is aligned to its elements. Equal ones are ordered by name:
    the same tensors give the same bytes, whatever order they are given in.

    Returns:
        The header, padded with spaces to a multiple of `DATA_ALIGNMENT` bytes, and the entries in the order of their
        data. The file's size is the last entry's `end`, or the header's length where there is no entry.
    """
    sized = sorted(((*tensor, tensor_nbytes(*tensor)) for tensor in tensors), key=_order)
    offsets = list(pairwise(accumulate((nbytes for *_, nbytes in sized), initial=0)))
    document: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for (name, dtype, shape, _), place in zip(sized, offsets, strict=True):
        if name == METADATA_KEY:
            raise CheckpointFormatError(
                "a name that the format keeps for itself", tensor=name, hint="give the tensor another name"
            )
        if name in document:
            raise DuplicateTensorError(
                "two tensors of one name can't be written", tensor=name, hint="give each tensor its own name"
            )
        document[name] = {"dtype": dtype.tag, "shape": shape, "data_offsets": place}
    header = _encode(document)
    return header, tuple(
        TensorEntry(name, dtype, shape, len(header) + begin, len(header) + end)
        for (name, dtype, shape, _), (begin, end) in zip(sized, offsets, strict=True)
    )


def _order(tensor: tuple[str, DType, tuple[int, ...], int]) -> tuple[bool, int, int, str]:
    name, dtype, _, nbytes = tensor
    whole_pages = nbytes % DATA_ALIGNMENT == 0
    return not whole_pages, 0 if whole_pages else -dtype.bits, -nbytes, name


def _encode(document: dict[str, object]) -> bytes:
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointFormatError(
            "a name that is not Unicode text can't be written",
            expected="Unicode characters, without lone surrogates",
            found=str(error),
            hint="give the tensor another name",
        ) from error
    size = len(text) + -(LENGTH.size + len(text)) % DATA_ALIGNMENT
    if size > LONGEST_HEADER:
        raise CheckpointFormatError(
            "more tensors than one safetensors header can name",
            expected=f"at most {LONGEST_HEADER} bytes",
            found=f"{size} bytes",
            hint="spread them over more files",
        )
    return LENGTH.pack(size) + text.ljust(size)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One safetensors file of the target: its bare name, its header, its tensors in the order of their data."""

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]
    size: int


def layout_files(tensors: Iterable[Form], max_shard_size: int, layout: Layout) -> tuple[PlannedFile, ...]:
    """Spread tensors of a layout over files in their order, each file as full as `max_shard_size` allows."""
    groups: list[list[Form]] = []
    room = 0
    for tensor in tensors:
        nbytes = tensor_nbytes(*tensor)
        if not groups or nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(tensor)
        room -= nbytes
    files = []
    for number, group in enumerate(groups, 1):
        header, entries = layout_header(group, {"format": "pt"})
        files.append(PlannedFile(file_name(layout, number, len(groups)), header, entries, entries[-1].end))
    return tuple(files)
