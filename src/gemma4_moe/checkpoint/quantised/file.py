"""The dequantised weights of one file, read at positions as if they were stored.

A quantised weight is read as a tensor of this file: its numbers are read from the file where they are stored, and
their values are computed in the memory that was asked to be filled.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.readers import PAGE
from gemma4_moe.checkpoint.stored import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma4_moe.checkpoint.quantised.weights import QuantisedWeight
    from gemma4_moe.checkpoint.readers import Readable, Reader


class DequantisedFile:
    """The dequantised weights of a file, one after the other. The file itself is opened, checked and closed alone."""

    def __init__(self, file: Readable) -> None:
        """Take the open file that has the numbers."""
        self.path: Path = file.path
        self._file = file
        self._weights: list[QuantisedWeight] = []
        self._starts: list[int] = [0]

    def add(self, weight: QuantisedWeight) -> StoredTensor:
        """Append a weight, and return it as a tensor of this file."""
        start = self._starts[-1]
        self._weights.append(weight)
        self._starts.append(start + weight.nbytes)
        return StoredTensor(weight.name, weight.dtype, weight.shape, start, self._starts[-1], self)

    def fileno(self) -> int:
        """Return -1: the values are on no disk."""
        return -1

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the bytes of one weight from `offset` on. Raises what the file's `read_into` does."""
        if destination.nbytes:
            weight, first, start, size = self._numbers(offset, destination.nbytes)
            flat = destination.cast("B")
            weight.weight.read_into(flat[flat.nbytes - size :], start)
            _dequantise(weight, first, flat)

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return a reader of large pieces, which reads numbers past the page cache unless `buffered`."""
        return _Reader(self, self._file.reader(buffered=buffered))

    def quickest_reader(self) -> Reader:
        """Return a reader of large pieces, which reads numbers in the quicker of two ways."""
        return _Reader(self, self._file.quickest_reader())

    def weight_at(self, offset: int) -> QuantisedWeight:
        """Return the weight whose first byte, or another, is at `offset`."""
        return self._weights[bisect_right(self._starts, offset) - 1]

    def read_with(self, reader: Reader, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read as a `Reader` does, by a reader of the file that has the numbers."""
        if not size:
            return buffer[:0]
        weight, first, start, count = self._numbers(offset, size)
        into = buffer[:size]
        raw = reader.read(weight.weight.start + start, count, buffer[(size - count) // PAGE * PAGE :])
        into[size - count :] = raw  # where `dequantise` looks for them; the regions may overlap
        _dequantise(weight, first, into)
        return into

    def _numbers(self, offset: int, size: int) -> tuple[QuantisedWeight, int, int, int]:
        """Return the weight at `offset`, its first element there, and the first byte and the size of its numbers."""
        number = bisect_right(self._starts, offset) - 1
        weight, before = self._weights[number], offset - self._starts[number]
        width, per_byte = weight.dtype.itemsize, weight.numbers.per_byte
        if before % width or size % width or before + size > weight.nbytes:
            raise ValueError(f"[{offset}, {offset + size}) is not a run of elements of {weight.name}")
        first, last = before // width, (before + size) // width
        return weight, first, first // per_byte, -(-last // per_byte) - first // per_byte


def _dequantise(weight: QuantisedWeight, first: int, buffer: memoryview) -> None:
    from gemma4_moe.checkpoint.quantised.arithmetic import dequantise  # headers are read without NumPy

    dequantise(weight, first, buffer)


class _Reader:
    """A reader of a `DequantisedFile`."""

    def __init__(self, file: DequantisedFile, numbers: Reader) -> None:
        self._file, self._numbers = file, numbers

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read as a `Reader` does."""
        return self._file.read_with(self._numbers, offset, size, buffer)

    def close(self) -> None:
        """Close the reader of the numbers."""
        self._numbers.close()


def weight_of(tensor: StoredTensor) -> QuantisedWeight | None:
    """Return the quantised weight that a tensor's values are computed from, or None if they are stored."""
    return tensor.file.weight_at(tensor.start) if isinstance(tensor.file, DequantisedFile) else None


def in_files(weights: Iterable[QuantisedWeight]) -> dict[str, StoredTensor]:
    """Return each weight as a tensor, by its name: of one `DequantisedFile` for each file that has numbers."""
    files: dict[int, DequantisedFile] = {}
    found = {}
    for weight in weights:
        stored = weight.weight.file
        found[weight.name] = files.setdefault(id(stored), DequantisedFile(stored)).add(weight)
    return found
