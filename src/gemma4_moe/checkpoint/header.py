"""The header of a safetensors file, read strictly.

A file is eight bytes n (little-endian), n bytes of JSON, then the data. The JSON maps each tensor's name to its dtype,
shape and [begin, end) in the data; together they must cover the data without holes or overlaps. The safetensors
library reads the same tensors from each header that is accepted here. It also accepts some that are refused here:
those with equal keys, unknown fields, white space before the first brace, names of more than 4,096 characters, or far
more commas than tensors need.
"""

from __future__ import annotations

import hashlib
import reprlib
import struct
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.strict_json import LARGEST_INTEGER, check_name, is_unsigned, load_object, repeated_key
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, TensorShapeError
from gemma4_moe.layout import dtypes

if TYPE_CHECKING:
    from gemma4_moe.layout.dtypes import DType

#: The length before the JSON.
LENGTH = struct.Struct("<Q")

#: The longest JSON that the format allows, in bytes.
LONGEST_HEADER = 100_000_000

#: More axes than torch or NumPy can hold.
MOST_AXES = 64

METADATA_KEY = "__metadata__"

_DAMAGED = "the header is damaged, or newer than this package: get the file again, or save it again with safetensors"
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. Its bytes are [start, end), counted from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A header.

    Attributes:
        entries: The tensors in the order of their data.
        metadata: The strings under `__metadata__`, by key.
        data_start: Offset of the first byte of data.
        digest: SHA-256 of the file's first `data_start` bytes, in hexadecimal.
    """

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_start: int
    digest: str


def header_size(prefix: bytes, file_size: int, *, file: object) -> int:
    """Return the size in bytes of length and JSON, from a file's first eight bytes.

    Raises:
        CheckpointFormatError: There are fewer than eight bytes, or this file can't have a header of that length.
    """
    if len(prefix) < LENGTH.size:
        hint = "the file is empty or was cut off: get it again"
        raise _wrong_size("too short for a safetensors file", file, "at least 8", file_size, hint)
    (length,) = LENGTH.unpack_from(prefix)
    longest = min(LONGEST_HEADER, file_size - LENGTH.size)
    if length > longest:
        problem = "the header is longer than the format, or the file, allows"
        hint = "the file was cut off, or is not a safetensors file: get it again"
        raise _wrong_size(problem, file, f"at most {longest}", length, hint)
    return LENGTH.size + int(length)


def _wrong_size(problem: str, file: object, expected: object, found: int, hint: str) -> CheckpointFormatError:
    return CheckpointFormatError(problem, file=file, expected=f"{expected} bytes", found=f"{found} bytes", hint=hint)


def parse_header(raw: bytes, file_size: int, *, file: object) -> Header:
    """Return the header of a file. The first bytes `raw` go at least to the header's end.

    Raises:
        CheckpointFormatError: The header breaks a rule of the format.
        DuplicateTensorError: Two entries have the same name.
        TensorShapeError: An entry has another number of bytes than its shape and dtype.
    """
    data_start = header_size(raw, file_size, file=file)
    raw = raw[:data_start]
    members = load_object(raw[LENGTH.size :], file=file, what="header")
    metadata = _metadata(dict(members).get(METADATA_KEY, ()), file)
    found = [_entry(name, value, data_start, file) for name, value in members if name != METADATA_KEY]
    twice = repeated_key(members)
    if twice is not None:
        raise DuplicateTensorError("the header has two entries of one name", tensor=twice, file=file, hint=_DAMAGED)
    entries = tuple(sorted(found, key=lambda entry: (entry.start, entry.end)))
    _check_coverage(entries, data_start, file_size, file)
    return Header(entries, metadata, data_start, hashlib.sha256(raw).hexdigest())


def _metadata(value: object, file: object) -> dict[str, str]:
    pairs = value if isinstance(value, tuple) else None
    if pairs is None or repeated_key(pairs) is not None or not all(type(text) is str for _, text in pairs):
        problem, found = "the metadata does not give each of its keys one string", reprlib.repr(value)
        raise CheckpointFormatError(problem, file=file, expected="an object of strings", found=found, hint=_DAMAGED)
    return dict(pairs)


def _entry(name: str, value: object, data_start: int, file: object) -> TensorEntry:
    check_name(name, file=file)
    pairs = value if isinstance(value, tuple) else ()
    fields = dict(pairs)
    if fields.keys() != _FIELDS or len(pairs) != len(_FIELDS):
        raise _bad_entry(name, file, "dtype, shape and data_offsets, each once", value)
    tag, shape, offsets = fields["dtype"], _integers(fields["shape"]), _integers(fields["data_offsets"])
    if not isinstance(tag, str) or tag not in dtypes.BY_TAG:
        raise _bad_entry(name, file, f"a dtype of the format: {', '.join(dtypes.BY_TAG)}", tag)
    if shape is None or len(shape) > MOST_AXES:
        raise _bad_entry(name, file, f"a shape of at most {MOST_AXES} integers from 0 to 2^64 - 1", fields["shape"])
    if offsets is None or len(offsets) != 2:
        raise _bad_entry(name, file, "data_offsets of two integers from 0 to 2^64 - 1", fields["data_offsets"])
    (begin, end), dtype = offsets, dtypes.BY_TAG[tag]
    nbytes = tensor_nbytes(name, dtype, shape, file=file)
    if end - begin != nbytes:
        raise TensorShapeError(
            "shape and dtype don't make the bytes that the entry claims",
            tensor=name,
            file=file,
            expected=f"{nbytes} bytes for {dtype.tag} {list(shape)}",
            found=f"{end - begin} bytes at [{begin}, {end})",
            hint=_DAMAGED,
        )
    return TensorEntry(name, dtype, shape, data_start + begin, data_start + end)


def _bad_entry(name: str, file: object, expected: str, found: object) -> CheckpointFormatError:
    problem, found = "a tensor's entry is not what the format asks for", reprlib.repr(found)
    return CheckpointFormatError(problem, tensor=name, file=file, expected=expected, found=found, hint=_DAMAGED)


def _integers(value: object) -> tuple[int, ...] | None:
    """Return an array of unsigned integers as a tuple, and anything else as None."""
    return tuple(value) if isinstance(value, list) and all(map(is_unsigned, value)) else None


def tensor_nbytes(name: str, dtype: DType, shape: tuple[int, ...], *, file: object = None) -> int:
    """Return the size of a tensor in bytes.

    Raises:
        TensorShapeError: The tensor does not fill whole bytes, or a step of the product exceeds 64 bits.
    """
    steps: list[int] = [*accumulate((*shape, dtype.bits), mul)]
    too_large = max(steps) > LARGEST_INTEGER
    if too_large or steps[-1] % 8:
        raise TensorShapeError(
            f"a shape that does not {'fit 64 bits' if too_large else 'fill whole bytes'}",
            tensor=name,
            file=file,
            expected="a size in bytes from 0 to 2^64 - 1",
            found=f"{dtype.tag} {list(shape)}",
            hint="give the tensor its real shape, or get the file that claims this one again",
        )
    return steps[-1] // 8


def _check_coverage(entries: tuple[TensorEntry, ...], data_start: int, file_size: int, file: object) -> None:
    covered = data_start
    for entry in entries:
        if entry.start != covered:
            raise CheckpointFormatError(
                "a hole before a tensor's data" if entry.start > covered else "two tensors share bytes",
                tensor=entry.name,
                file=file,
                expected=f"its data at byte {covered} of the file",
                found=f"byte {entry.start}",
                hint=_DAMAGED,
            )
        covered = entry.end
    if covered != file_size:
        problem = "the file is cut off" if covered > file_size else "bytes after the last tensor"
        hint = "the file is damaged or was not copied to its end: get it again"
        raise _wrong_size(problem, file, covered, file_size, hint)
