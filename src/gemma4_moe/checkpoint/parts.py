"""A tensor in parts: boxes of its elements in several files, read by ranges of bytes like a tensor in one place.

Ranks that save their own shards leave such parts. A part is a box: it begins at `offsets` of the whole tensor and has a
`shape`; its elements are C-contiguous in their file. Together the parts must be the whole tensor, each element once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.readers import PageReader, drop_cache
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, TensorShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.readers import Readable, ReadAt, Reader
    from gemma4_moe.layout.dtypes import DType

#: Bytes of several runs that are read at once, before each is copied to its place.
_RUNS_BYTES = 2**20

#: The most bands of a part; one that is cut on three axes has as many as it has experts.
_MOST_BANDS = 2**16

_AGAIN = "the step is incomplete, or mixed with another one: name another step, or get its files again"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a tensor, in a file from byte `start` on."""

    file: Readable
    start: int
    dtype: DType
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The index after the last on each axis of the whole tensor."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.shape, strict=True))

    def meets(self, other: Part) -> bool:
        """Return whether two parts have an element in common."""
        theirs = zip(other.offsets, other.ends, strict=True)
        return all(a < d and c < b for a, b, (c, d) in zip(self.offsets, self.ends, theirs, strict=True))

    def __str__(self) -> str:
        ranges = ", ".join(f"{a}:{b}" for a, b in zip(self.offsets, self.ends, strict=True))
        return f"[{ranges}] in {self.file.path.name}"


def whole_shape(name: str, parts: Sequence[Part], called: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of the tensor that these parts are, after checking that they are all of it.

    Args:
        name: The tensor's name, for errors.
        parts: At least one.
        called: The shape that the config calls for, if it does. Without it the parts' own ends decide, and a part
            that is missing at an end can't be noticed.

    Raises:
        TensorShapeError: Parts have different dtypes or numbers of axes.
        DuplicateTensorError: Two parts have an element in common.
        CheckpointFormatError: An element is in no part.
    """
    first = parts[0]
    for part in parts:
        if (part.dtype, len(part.shape)) != (first.dtype, len(first.shape)):
            raise TensorShapeError(
                "parts of one tensor differ in dtype or in their number of axes",
                tensor=name,
                file=part.file.path,
                expected=f"{first.dtype.name}, {len(first.shape)} axes, as {first}",
                found=f"{part.dtype.name}, {len(part.shape)} axes",
                hint=_AGAIN,
            )
    shape = tuple(map(max, zip(*(part.ends for part in parts), strict=True)))
    if len(parts) > 1 and (first.dtype.bits % 8 or any(prod(part.shape[:-2]) > _MOST_BANDS for part in parts)):
        raise TensorShapeError(
            "parts of a tensor that can't be joined",
            tensor=name,
            expected=f"elements of whole bytes, and at most {_MOST_BANDS} matrices in a part",
            found=f"{first.dtype.name} {list(shape)} in {len(parts)} parts",
            hint=_AGAIN,
        )
    if called is not None and len(called) == len(shape) and all(map(int.__le__, shape, called)):
        shape = called
    _check_apart(name, [part for part in parts if prod(part.shape)])
    there, wanted = sum(prod(part.shape) for part in parts), prod(shape)
    if there != wanted:
        raise CheckpointFormatError(
            "parts of a tensor are missing",
            tensor=name,
            file=first.file.path.parent,
            expected=f"{wanted:,} elements of {list(shape)}" + ("" if called is None else ", as config.json calls for"),
            found=f"{there:,} in {len(parts)} parts: " + ", ".join(map(str, parts[:4])) + (", …" * (len(parts) > 4)),
            hint=_AGAIN,
        )
    return shape


def _check_apart(name: str, parts: Sequence[Part]) -> None:
    """Check that no two parts meet: those that begin on axis 0 before another ends are compared."""
    open_parts: list[Part] = []
    for part in sorted(parts, key=lambda part: part.offsets):
        open_parts = [other for other in open_parts if not part.shape or other.ends[0] > part.offsets[0]]
        for other in open_parts:
            if part.meets(other):
                raise DuplicateTensorError(
                    "two parts of a tensor overlap",
                    tensor=name,
                    file=part.file.path,
                    expected="each element in one part",
                    found=f"{other} and {part}",
                    hint="files of two saves are mixed: name another step, or save this one again",
                )
        open_parts.append(part)


class _Band(NamedTuple):
    """Runs of bytes that follow one another in a file, and lie at equal distances in the whole tensor.

    Attributes:
        start: The first run's first byte in the file.
        position: Its place in the whole tensor, in bytes.
        width: Bytes of a run.
        distance: Bytes from the begin of one run to that of the next, in the whole tensor.
        runs: The number of runs.
    """

    file: ReadAt
    start: int
    position: int
    width: int
    distance: int
    runs: int

    @property
    def end(self) -> int:
        """The byte after the last run, in the whole tensor."""
        return self.position + (self.runs - 1) * self.distance + self.width


class FileOfParts:
    """The bytes of one whole tensor, which are in parts of other files. It is open as long as they are."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, ...]) -> None:
        """Take parts that `whole_shape` has checked, at least one, and the whole tensor's shape."""
        self.path: Path = parts[0].file.path
        self._bands = sorted(
            (band for part in parts for band in _bands(part, shape)), key=lambda band: (band.position, band.end)
        )

    def fileno(self) -> int:
        """Return -1: no one file has these bytes."""
        return -1

    def reader(self, *, buffered: bool = False) -> Reader:  # noqa: ARG002 - parts are small for direct reads
        """Return a reader of large pieces, which leaves none in the page cache."""
        return _PartsReader(self)

    def quickest_reader(self) -> Reader:
        """Return the same as `reader`."""
        return _PartsReader(self)

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` (C-contiguous) with the tensor's bytes from `offset` on. Raises what the files raise."""
        for _ in self.pieces(offset, destination):
            pass

    def pieces(self, offset: int, destination: memoryview) -> Iterator[tuple[ReadAt, int, int]]:
        """Fill `destination`, and yield each range that was read for it: a file, the first byte, and the size."""
        destination = destination.cast("B") if destination.nbytes else destination
        end = offset + destination.nbytes
        for band in self._bands:
            if band.position >= end:
                break
            if band.end > offset:
                yield from _read_band(band, offset, destination)


class _PartsReader(PageReader):
    """Reads pieces of a tensor in parts through the page cache, and drops them from it."""

    def __init__(self, file: FileOfParts) -> None:
        super().__init__(file, buffered=True)
        self._parts = file

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read as a `Reader` does."""
        into = buffer[:size]
        for file, start, count in self._parts.pieces(offset, into):
            drop_cache(file.fileno(), start, count)
        return into


def _bands(part: Part, shape: tuple[int, ...]) -> Iterator[_Band]:
    """Yield the bands of a part of a tensor; there is one, unless three axes or more are cut, or the middle one."""
    if not prod(part.shape):
        return
    cut = [axis for axis, size in enumerate(shape) if part.shape[axis] != size]
    last = cut[-1] if cut else 0  # the axes behind it are whole, so a run goes over them
    outer = cut[-2] if len(cut) > 1 else 0  # the axes between the two are whole, so runs are even
    itemsize = part.dtype.itemsize
    strides = [prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    width = prod(part.shape[last:]) * itemsize
    distance = shape[last] * strides[last] if shape else width
    count = prod(part.shape[outer:last])
    begin = sum(map(mul, part.offsets, strides))
    for number, indices in enumerate(product(*map(range, part.shape[:outer]))):
        position = begin + sum(map(mul, indices, strides))
        yield _Band(part.file, part.start + number * count * width, position, width, distance, count)


def _read_band(band: _Band, offset: int, destination: memoryview) -> Iterator[tuple[ReadAt, int, int]]:
    """Fill `destination`, which begins at `offset` of the whole tensor, with the bytes of a band that belong there."""
    end = offset + destination.nbytes
    first = max(0, (offset - band.position) // band.distance)
    last = min(band.runs, -(-(end - band.position) // band.distance))
    run = first
    while run < last:
        begin = band.position + run * band.distance
        whole = begin >= offset and begin + band.width <= end
        if whole and (several := min(last - run, _RUNS_BYTES // band.width)) > 1:
            while begin + (several - 1) * band.distance + band.width > end:  # the last run may be cut by the end
                several -= 1
        else:
            several = 1
        start = band.start + run * band.width
        if several > 1:
            _scatter(band, start, several, destination[begin - offset :])
            yield band.file, start, several * band.width
        else:
            low, high = max(begin, offset), min(begin + band.width, end)
            if low < high:
                band.file.read_into(start + low - begin, destination[low - offset : high - offset])
                yield band.file, start + low - begin, high - low
        run += several


def _scatter(band: _Band, start: int, count: int, destination: memoryview) -> None:
    """Read `count` runs from `start` on, and copy each to its place from the begin of `destination` on."""
    import numpy as np  # headers are read without it

    content = np.empty((count, band.width), np.uint8)
    band.file.read_into(start, memoryview(content.data).cast("B"))
    into = np.frombuffer(destination, np.uint8)
    size = (count - 1) * band.distance + band.width
    places = np.lib.stride_tricks.as_strided(into[:size], (count, band.width), (band.distance, 1))
    places[...] = content
