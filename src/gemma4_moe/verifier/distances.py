"""The distance of a tensor from the expected one: largest absolute and relative difference, and cosine.

Only elements that are finite on both sides have a distance. The others are counted. All sums are in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.verifier.arithmetic import widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.verifier.arithmetic import Bits, Floats


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of the elements that were found from those that were expected.

    Attributes:
        max_absolute: The largest |found − expected| of elements that are finite on both sides, or None without any.
        max_relative: The largest |found − expected| / |expected| of those whose expected value is not zero, or None.
        cosine: The cosine between the finite elements of both sides as two vectors, in [-1, 1]; None if one is zero.
        nan: How many elements are NaN on one side or on both.
        infinite: How many others are infinite on one side or on both.
    """

    max_absolute: float | None
    max_relative: float | None
    cosine: float | None
    nan: int
    infinite: int

    def __str__(self) -> str:
        measures = {"absolute": self.max_absolute, "relative": self.max_relative}
        sizes = ", ".join(f"{label} {shown(size)}" for label, size in measures.items() if size is not None)
        counts = {"NaN": self.nan, "infinite": self.infinite}
        facts = [
            sizes and f"largest difference: {sizes}",
            "" if self.cosine is None else f"cosine {shown(self.cosine)}",
            *(f"{count:,} {label}" for label, count in counts.items() if count),
        ]
        return "; ".join(filter(None, facts))


def shown(value: float) -> str:
    """Return a measure as text for people, with digits enough to tell a cosine from one."""
    return f"{value:.9g}"


class Distances:
    """The distance of tensors of one dtype, summed up piece by piece."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype
        self._absolute: float | None = None
        self._relative: float | None = None
        self._both = self._expected = self._found = 0.0
        self._nan = self._infinite = 0

    def add(self, expected: Bits, found: Bits) -> None:
        """Add the elements of a piece, of one shape on both sides. Only floats count."""
        if self._dtype.float_format is not None:
            self._add(widen(expected, self._dtype), widen(found, self._dtype))

    def _add(self, expected: Floats, found: Floats) -> None:
        finite = np.isfinite(expected) & np.isfinite(found)
        nan = int(np.count_nonzero(np.isnan(expected) | np.isnan(found)))
        self._nan += nan
        self._infinite += finite.size - int(np.count_nonzero(finite)) - nan
        expected, found = expected[finite], found[finite]
        self._both += float(expected @ found)
        self._expected += float(expected @ expected)
        self._found += float(found @ found)
        difference = np.abs(found - expected)
        divides = expected != 0
        relative = difference[divides] / np.abs(expected[divides])
        self._absolute = _largest([self._absolute, _maximum(difference)])
        self._relative = _largest([self._relative, _maximum(relative)])

    def distance(self) -> Distance | None:
        """Return the distance of all pieces that were added, or None if their dtype has none."""
        if self._dtype.float_format is None:
            return None
        lengths = math.sqrt(self._expected) * math.sqrt(self._found)
        cosine = max(-1.0, min(1.0, self._both / lengths)) if lengths else None
        return Distance(self._absolute, self._relative, cosine, self._nan, self._infinite)


def worst(distances: Sequence[Distance]) -> Distance | None:
    """Return the largest differences of several tensors, the least cosine, and the sums of their counts."""
    if not distances:
        return None
    return Distance(
        _largest([distance.max_absolute for distance in distances]),
        _largest([distance.max_relative for distance in distances]),
        min((distance.cosine for distance in distances if distance.cosine is not None), default=None),
        sum(distance.nan for distance in distances),
        sum(distance.infinite for distance in distances),
    )


def _maximum(values: Floats) -> float | None:
    return float(values.max()) if values.size else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
