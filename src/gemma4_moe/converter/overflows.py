"""Count what a cast to a narrower range makes infinite: values that were finite before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gemma4_moe.layout.dtypes import DType

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements are looked at at once.
_PIECE = 2**20


def can_overflow(source: DType, target: DType) -> bool:
    """Return whether a finite value of `source` can become infinite in `target`."""
    old, new = source.float_format, target.float_format
    if old is None or new is None:
        return False
    return (old.max_exponent, old.precision) > (new.max_exponent, new.precision)


def count_overflows(source: Array, result: Array) -> int:
    """Return how many infinities of `result` have an element of `source` that is finite.

    Args:
        source: The array that was cast.
        result: The same elements at the same places, of two bytes each.
    """
    infinity = np.array(np.inf, result.dtype).view(np.uint16) << 1  # without its sign
    rows = max(1, _PIECE // max(1, result[:1].size))
    count = 0
    for row in range(0, len(result), rows):
        infinite = result[row : row + rows].view(np.uint16) << 1 == infinity
        count += int(np.count_nonzero(np.isfinite(source[row : row + rows][infinite])))
    return count
