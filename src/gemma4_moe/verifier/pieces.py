"""Pieces of a tensor and of its source: read on both sides through bounded buffers, and compared."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from gemma4_moe.verifier.arithmetic import element_bits, widen
from gemma4_moe.verifier.assembled import rows_of
from gemma4_moe.verifier.differences import Mismatches
from gemma4_moe.verifier.distances import Distances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference

    #: Raises if the comparison is to end, because of an interrupt or a failure elsewhere.
    Check = Callable[[], None]

    #: A piece of a target: its place as in `Mismatches.compare`, the expected elements, and those that were found.
    Piece = tuple[tuple[int, int], Bits, Bits]

#: Rows and columns of an expert that are computed at once: a tile of both sides stays in the cache.
_TILE = 256

#: Bytes of both sides together that are read of an experts' tensor at once, unless one expert is larger.
_BLOCK_BYTES = 8 * 2**20

#: How many elements are compared at once if no axes are exchanged.
_PIECE = 2**16


class Pieces(Protocol):
    """Reads a tensor on both sides, as often as it is called."""

    def __call__(self, *, scan: bool) -> Iterator[Piece]:
        """Yield all pieces; `scan` looks for odd values of the source too."""


def compare_pieces(target: Values, pieces: Pieces) -> list[Difference]:
    """Compare all pieces of a target.

    Only a tensor that differs is measured: from its first difference on, and then from its start to there.
    """
    values, distances, equal = Mismatches(target.shape, target.dtype), Distances(target.dtype), 0
    for place, expected, found in pieces(scan=True):
        values.compare(expected, found, *place)
        if values.count:
            distances.add(expected, found)
        else:
            equal += 1
    if values.count:
        for _, expected, found in islice(pieces(scan=False), equal):
            distances.add(expected, found)
    return values.difference(target.name, distances)


def scan_expert(odd: Oddities, source: Values, expert: int, content: Bits) -> None:
    """Take in the values [R, C] of one expert, under the names of the tensors that store them."""
    for name, rows in rows_of(source, expert):
        odd.scan(name, content[rows].reshape(-1).view(np.uint8), source.dtype, (expert, expert + 1))


def elements(source: Values, target: Values, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
    """Yield pieces of two tensors after the number of their first element, both valid until the next step."""
    old_size, new_size = (element_bits(tensor.dtype).itemsize for tensor in (source, target))
    count = target.nbytes // new_size
    step = max(_PIECE, min(memory, _BLOCK_BYTES) // (old_size + new_size))
    buffers = np.empty(min(step, count) * old_size, np.uint8), np.empty(min(step, count) * new_size, np.uint8)
    for first in range(0, count, step):
        length = min(step, count - first)
        old = read_into(buffers[0][: length * old_size], source, first * old_size)
        new = read_into(buffers[1][: length * new_size], target, first * new_size)
        for begin in range(0, length, _PIECE):
            check()
            yield first + begin, old[begin : begin + _PIECE], new[begin : begin + _PIECE]


def experts(source: Values, target: Values, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
    """Yield each expert's number, its source [R, C] and its target [C, R], both valid until the next step."""
    count, columns, rows = target.shape
    old_bytes, new_bytes = source.nbytes // count, target.nbytes // count
    step = max(1, min(count, min(memory, _BLOCK_BYTES) // (old_bytes + new_bytes)))
    buffers = np.empty(step * old_bytes, np.uint8), np.empty(step * new_bytes, np.uint8)
    for first in range(0, count, step):
        check()
        numbers = range(first, min(first + step, count))
        old = read_into(buffers[0][: len(numbers) * old_bytes], source, first * old_bytes)
        new = read_into(buffers[1][: len(numbers) * new_bytes], target, first * new_bytes)
        yield from zip(numbers, old.reshape(-1, rows, columns), new.reshape(-1, columns, rows), strict=True)


class Tile(NamedTuple):
    """A tile [c, r] of a source [R, C], exchanged, and of its target [C, R].

    Attributes:
        place: Its place in the flat target, as in `Mismatches.compare`.
        rows: Its rows of the source.
        columns: Its columns of the source.
    """

    place: tuple[int, int]
    source: Bits
    target: Bits
    rows: slice
    columns: slice


def tiles(expert: int, source: Bits, target: Bits, check: Check) -> Iterator[Tile]:
    """Yield the tiles of an expert."""
    columns, rows = target.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            check()
            own, other = slice(row, row + _TILE), slice(column, column + _TILE)
            place = (expert * columns + column) * rows + row, rows
            yield Tile(place, source[own, other].T, target[other, own], own, other)


def read(tensor: Values) -> Bits:
    """Return the elements of a whole tensor."""
    return read_into(np.empty(tensor.nbytes, np.uint8), tensor, 0)


def read_into(buffer: Bits, tensor: Values, start: int) -> Bits:
    """Fill a buffer with a tensor's bytes from byte `start` on, and return the buffer as elements."""
    tensor.read_into(memoryview(buffer.data), start)
    return buffer.view(element_bits(tensor.dtype))


def factors_of(scale: Values) -> list[float]:
    """Return the values of a scale [E]."""
    values: list[float] = widen(read(scale), scale.dtype).tolist()
    return values
