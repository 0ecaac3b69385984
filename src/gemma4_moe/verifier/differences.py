"""A difference between two checkpoints: collected from pieces of a tensor, folded over layers, and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma4_moe.layout.names import fold_names
from gemma4_moe.verifier.arithmetic import element_bits, widen
from gemma4_moe.verifier.distances import worst

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.distances import Distance, Distances

Kind = Literal["missing", "extra", "shape", "dtype", "values", "fold", "file", "scaling"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between a target and its expected contents.

    Attributes:
        name: The tensor, as the target names it, or the side file.
        kind: "missing": the target lacks it. "extra": only the target has it. "shape", "dtype": these differ.
            "values": elements have other bits. "fold": the fold of `down_proj` and its `per_expert_scale` has other
            bits. "file": a side file is missing or has other bytes. "scaling": an adapter's module has another.
        expected: The expected dtype, shape or size; for elements, value and hexadecimal bits of the first that differs.
        found: The same of the target.
        count: How many elements differ; of a packed dtype, how many bytes.
        index: The index of the first of them, in the target's axes.
        ulps: The distance of its two values in units in the last place: the number of steps from one value of the
            compared dtype to the next. None if one value is NaN, or the dtype has no such steps.
        max_ulps: The largest of these distances over all elements that differ and have one.
        distance: For floats, the distance of all elements. None for other dtypes, and if values were not compared.
    """

    name: str
    kind: Kind
    expected: str | None
    found: str | None
    count: int | None = None
    index: tuple[int, ...] | None = None
    ulps: int | None = None
    max_ulps: int | None = None
    distance: Distance | None = None

    def __str__(self) -> str:
        if self.index is None:
            sides = {"expected": self.expected, "found": self.found}
            return f"{self.name}: {self.kind}: " + ", ".join(f"{side} {text}" for side, text in sides.items() if text)
        folded = ", folded with its scale" if self.kind == "fold" else ""
        text = f"{self.name}{folded}: elements that differ: {self.count:,}\n"
        text += f"  first at {list(self.index)}: expected {self.expected}, found {self.found}"
        if self.ulps is not None:
            text += f", distance in ulps: {self.ulps:,}"
        if self.max_ulps is not None:
            text += f"\n  largest distance in ulps: {self.max_ulps:,}"
        if self.distance is not None:
            text += f"\n  {self.distance}"
        return text


@dataclass(frozen=True, slots=True)
class FoldedDifference:
    """The differences of one kind in tensors whose names differ in their numbers alone.

    Attributes:
        name: The names of the tensors, folded: layers.{0...29}.
        kind: As in `Difference`.
        tensors: How many tensors differ so.
        count: How many of their elements differ, or None if values were not compared.
        max_ulps: The largest `max_ulps` of all, or None.
        distance: The largest differences, the least cosine and the sums of the counts of all, or None.
    """

    name: str
    kind: Kind
    tensors: int
    count: int | None
    max_ulps: int | None
    distance: Distance | None


def fold_differences(differences: Sequence[Difference]) -> list[FoldedDifference]:
    """Return the differences of tensors folded over layers, in the order of the first of each. Files are left out."""
    folded = []
    for kind in dict.fromkeys(difference.kind for difference in differences if difference.kind != "file"):
        named = {difference.name: difference for difference in differences if difference.kind == kind}
        for name, names in fold_names(named).items():
            own = [named[each] for each in names]
            counts = [difference.count for difference in own if difference.count is not None]
            ulps = [difference.max_ulps for difference in own if difference.max_ulps is not None]
            distance = worst([difference.distance for difference in own if difference.distance is not None])
            total = sum(counts) if counts else None
            folded.append(FoldedDifference(name, kind, len(own), total, max(ulps, default=None), distance))
    return folded


class Mismatches:
    """The elements of one tensor that differ, collected piece by piece; both sides have one shape and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: DType) -> None:
        self.count = 0
        self._shape = shape
        self._dtype = dtype
        self._first: tuple[int, int, int] | None = None
        self._max_ulps: int | None = None

    def compare(self, expected: Bits, found: Bits, first: int, stride: int = 0) -> None:
        """Compare one piece [rows, columns] of the target.

        In the flat target its first element is at `first`, and two rows begin `stride` elements apart.
        """
        wrong = expected != found
        if not wrong.any():
            return
        rows, columns = np.nonzero(wrong)
        expected, found = expected[wrong], found[wrong]
        position = first + int(rows[0]) * stride + int(columns[0])
        if self._first is None or position < self._first[0]:
            self._first = position, int(expected[0]), int(found[0])
        self.count += len(rows)
        distances = _ulps(expected, found, self._dtype)
        if distances.size:
            self._max_ulps = max(int(distances.max()), self._max_ulps or 0)

    def add(self, other: Mismatches) -> None:
        """Add the mismatches of other elements of the same tensor."""
        if other._first is not None and (self._first is None or other._first[0] < self._first[0]):
            self._first = other._first
        self.count += other.count
        if other._max_ulps is not None:
            self._max_ulps = max(other._max_ulps, self._max_ulps or 0)

    def difference(self, name: str, distances: Distances, kind: Kind = "values") -> list[Difference]:
        """Return the difference of tensor `name`, if there is one, with the distance of all its elements."""
        if self._first is None:
            return []
        position, *values = self._first
        expected, found = (np.array([value], element_bits(self._dtype)) for value in values)
        ulps = _ulps(expected, found, self._dtype)
        element = position * expected.itemsize * 8 // self._dtype.bits  # a byte of a packed dtype holds several
        index = tuple(int(axis) for axis in np.unravel_index(element, self._shape))
        first = int(ulps[0]) if ulps.size else None
        texts = _text(expected, self._dtype), _text(found, self._dtype)
        return [Difference(name, kind, *texts, self.count, index, first, self._max_ulps, distances.distance())]


def _ulps(expected: Bits, found: Bits, dtype: DType) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the distances of those pairs that have one.

    Floats of one sign are ordered as their bits are. So a float's place on the line is the integer of its magnitude's
    bits, negated if the float is negative. Both zeros are at 0, infinity is one step after the largest finite number.
    """
    if dtype.float_format is None:
        return np.empty(0, np.int64)
    numbers = ~(np.isnan(widen(expected, dtype)) | np.isnan(widen(found, dtype)))
    one, other = _places(expected[numbers], dtype), _places(found[numbers], dtype)
    return np.abs(one - other)


def _places(bits: Bits, dtype: DType) -> np.ndarray[Any, np.dtype[np.int64]]:
    magnitude = (bits & ((1 << dtype.bits - 1) - 1)).astype(np.int64)
    return np.where(bits >> dtype.bits - 1, -magnitude, magnitude)


def _text(bits: Bits, dtype: DType) -> str:
    """Return one element as text: its bits, and its value if the dtype has numbers that we can show."""
    raw = f"0x{int(bits[0]):0{2 * bits.itemsize}X}"
    if dtype.float_format is not None:
        return f"{float(widen(bits, dtype)[0]):.9g} ({raw})"
    if dtype.tag[0] in "IU" or dtype.name in ("float64", "bool"):
        return f"{bits.view(dtype.numpy())[0]} ({raw})"
    return raw
