"""A quantised weight: the stored tensors that its values are computed from, and the grid of its scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType

#: How many elements of a row share one scale in NVFP4.
NVFP4_GROUP = 16


class Numbers(StrEnum):
    """How the numbers of a weight are stored, before any scale."""

    E4M3 = "e4m3"  # one number a byte
    E2M1 = "e2m1"  # two a byte, the first in the low half: a sign bit, then an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6
    E2M1_UNSIGNED_ZERO = "e2m1 without -0"  # the same, and a zero has no sign

    @property
    def per_byte(self) -> int:
        """How many numbers a byte has."""
        return 1 if self is Numbers.E4M3 else 2


class Grid(NamedTuple):
    """Which scale belongs to element (r, c) of each matrix [R, C] of a weight: (r // height, c // width).

    Attributes:
        rows: Rows of the grid of one matrix.
        columns: Its columns.
        height: Rows of the matrix that share a scale.
        width: Columns that share it.
        shared: Whether all matrices share one grid.
    """

    rows: int
    columns: int
    height: int
    width: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """One quantised weight. An element is number × scale, or number × (scale × second), or number × (scale ÷ second).

    Both products and the quotient are rounded to fp32, and the element then to `dtype`.

    Attributes:
        name: Its name in a checkpoint that is not quantised.
        shape: [R, C], or [E, R, C], in elements.
        dtype: The dtype of its elements.
        numbers: How the numbers of `weight` are stored.
        weight: The stored numbers.
        scale: The scales of the grid, in the order of matrices, rows and columns.
        grid: Which scale belongs to which element.
        second: One further scale, or one for each matrix; None if there is none.
        divides: Whether the second scale divides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    numbers: Numbers
    weight: StoredTensor
    scale: StoredTensor
    grid: Grid
    second: StoredTensor | None = None
    divides: bool = False

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def grid_of(shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> Grid | None:
    """Return the grid of a scale of this shape for a weight [R, C] or [E, R, C]; None if it fits none.

    A scale has one number for each tensor, matrix, row or, if `block` (height, width) is given, block.
    """
    *lead, rows, columns = shape
    if prod(scale) == 1:
        return Grid(1, 1, rows, columns, shared=True)
    if lead and scale[:1] == tuple(lead) and prod(scale) == lead[0] and len(scale) <= len(shape):
        return Grid(1, 1, rows, columns)
    if scale in ((*lead, rows), (*lead, rows, 1)):
        return Grid(rows, 1, 1, columns)
    if block is not None:
        height, width = block
        down, across = -(-rows // height), -(-columns // width)
        if scale == (*lead, down, across):
            return Grid(down, across, height, width)
    return None


def rectangles(first: int, last: int, columns: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield elements (first, last) of matrices below each other as rectangles: rows (start, end), columns (start, end).

    They are in order, and of at most about `most` elements.
    """
    while first < last:
        row, column = divmod(first, columns)
        if column or last - first < columns:
            end = min(last, first - column + columns)
            yield row, row + 1, column, column + end - first
        else:
            count = min((last - first) // columns, max(1, most // columns))
            end = first + count * columns
            yield row, row + count, 0, columns
        first = end
