"""One part in a `.distcp` file: where its elements are in the archive that torch.save has written.

The archive is a zip without compression: `data.pkl` describes the tensor, `data/0` has its bytes. The description is
read by `restricted_pickle`, and the bytes are where the zip says.
"""

from __future__ import annotations

import io
import struct
import zipfile
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_moe.checkpoint.parts import Part
from gemma4_moe.checkpoint.restricted_pickle import Record, load
from gemma4_moe.errors import CheckpointFormatError, UnsupportedCheckpointError
from gemma4_moe.layout.dtypes import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.file import IdentifiedFile, OpenFile
    from gemma4_moe.layout.dtypes import DType

#: The longest description of a part, in bytes. Real ones have about 200.
_LONGEST_DESCRIPTION = 2**16

#: The head of an entry of a zip: its signature, flags and compression, and the lengths of its name and extra field.
_LOCAL = struct.Struct("<4s2xHH16xHH")
_SIGNATURE = b"PK\x03\x04"

_STORAGES = {
    **{
        f"{name}Storage": dtype for name, dtype in (("BFloat16", "bfloat16"), ("Half", "float16"), ("Float", "float32"))
    },
    **{f"{name}Storage": dtype for name, dtype in (("Double", "float64"), ("Long", "int64"), ("Int", "int32"))},
    **{f"{name}Storage": dtype for name, dtype in (("Short", "int16"), ("Char", "int8"), ("Byte", "uint8"))},
    "BoolStorage": "bool",
}

_AGAIN = "the directory is damaged or incomplete: name another step, or get its files again"


class _Tensor(NamedTuple):
    """A tensor of a description: its storage (dtype, key in the archive, elements), and its view of that."""

    storage: tuple[str, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Entry(NamedTuple):
    """The bytes of an entry, from `start` of the file on."""

    start: int
    size: int

    def read(self, file: OpenFile) -> bytes:
        """Return a short entry's bytes."""
        if self.size > _LONGEST_DESCRIPTION:
            raise _damaged(file, f"a description of {self.size} bytes")
        content = bytearray(self.size)
        file.read_into(self.start, memoryview(content))
        return bytes(content)


class _Slice(io.RawIOBase):
    """Bytes (start, start + size) of an open file, as a file."""

    def __init__(self, file: OpenFile, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            self._file.read_into(self._start + self._at, memoryview(buffer)[:count])
        self._at += count
        return count


def dtype_of(properties: Any, name: str, path: Path) -> DType:
    """Return the dtype of a tensor from its stored properties."""
    found = properties[0] if isinstance(properties, tuple) and properties else None
    if not isinstance(found, str) or found not in BY_NAME:
        raise UnsupportedCheckpointError(
            "a tensor of a dtype that safetensors does not have", tensor=name, file=path, found=found, hint="cast it"
        )
    return BY_NAME[found]


def open_part(
    file: IdentifiedFile, place: Record, dtype: DType, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> Part:
    """Return the part that a file holds at a place (`offset`, `length`) of the metadata.

    Raises:
        CheckpointFormatError: There is no such part, or another one.
        UnsupportedCheckpointError: It is compressed, or its elements are in another order.
    """
    start, length = place.get("offset"), place.get("length")
    if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= file.size:
        raise _damaged(file, f"{length} bytes at {start}, of {file.size}")
    if place.get("transform_descriptors"):
        raise UnsupportedCheckpointError(
            "parts that were transformed when they were saved, such as compressed",
            file=file.path,
            found=place.get("transform_descriptors"),
            hint="save without extensions",
        )
    entries = _entries(file, start, length)
    tensor = _described(entries, file)
    if "byteorder" in entries and entries["byteorder"].read(file) != b"little":
        raise _damaged(file, "big-endian numbers")
    data = entries.get(f"data/{tensor.storage[1]}")
    expected = _Tensor((dtype.name, tensor.storage[1], prod(shape)), 0, shape, tensor.stride)
    if data is None or tensor != expected or data.size != prod(shape) * dtype.itemsize:
        raise _damaged(file, f"{tensor.storage[0]} {list(tensor.shape)}, not {dtype.name} {list(shape)}")
    _check_order(tensor, file)
    return Part(file, data.start, dtype, offsets, shape)


def _entries(file: OpenFile, start: int, length: int) -> dict[str, _Entry]:
    """Return the entries of an archive in a file by their names, without the archive's own name before them."""
    found = {}
    try:
        with zipfile.ZipFile(_Slice(file, start, length)) as opened:  # reads the list of entries alone
            listed = opened.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise _damaged(file, f"no archive of torch.save at byte {start}: {error}") from error
    for entry in listed:
        local = bytearray(_LOCAL.size)
        at = start + entry.header_offset
        if not start <= at <= at + len(local) <= start + length:
            raise _damaged(file, f"no entry at byte {at}")
        file.read_into(at, memoryview(local))
        signature, flags, compression, name_size, extra_size = _LOCAL.unpack(local)
        begin = at + _LOCAL.size + name_size + extra_size
        stored = not flags & 1 and compression == entry.compress_type == zipfile.ZIP_STORED
        if signature != _SIGNATURE or not stored or begin + entry.file_size > start + length:
            raise _damaged(file, f"no data at byte {begin}")
        found[entry.filename.partition("/")[2]] = _Entry(begin, entry.file_size)
    return found


def _described(entries: Mapping[str, _Entry], file: OpenFile) -> _Tensor:
    """Return the tensor that `data.pkl` describes."""
    entry = entries.get("data.pkl")
    if entry is None:
        raise _damaged(file, "no data.pkl")
    known: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in _STORAGES.items()}
    known["torch._utils", "_rebuild_tensor_v2"] = lambda storage, offset, size, stride, *_: _Tensor(
        storage, offset, size, stride
    )
    known["collections", "OrderedDict"] = dict

    def storage(found: Any) -> tuple[str, str, int]:
        kind, dtype, key, _, elements = found
        if kind != "storage" or not all(isinstance(text, str) for text in (dtype, key)):
            raise ValueError("no storage")
        return dtype, key, elements

    tensor = load(entry.read(file), known, file=file.path, persistent=storage)
    if not isinstance(tensor, _Tensor):
        raise _damaged(file, "no tensor")
    return tensor


def _check_order(tensor: _Tensor, file: OpenFile) -> None:
    """Check that a tensor's elements are C-contiguous; the stride of an axis of one element does not matter."""
    strides = [*accumulate(reversed((*tensor.shape[1:], 1)), mul)][::-1][: len(tensor.shape)]
    if any(size > 1 and own != stride for size, own, stride in zip(tensor.shape, tensor.stride, strides, strict=True)):
        raise UnsupportedCheckpointError(
            "a part whose elements are stored in another order, as of a transposed view",
            file=file.path,
            expected=f"strides {strides} of {list(tensor.shape)}",
            found=list(tensor.stride),
            hint="save it again with contiguous tensors",
        )


def _damaged(file: OpenFile, found: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        "a part is not where the metadata says, or not what it says", file=file.path, found=found, hint=_AGAIN
    )
