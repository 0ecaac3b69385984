"""Count what a cast to a narrower range makes infinite: values that were finite before."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.checkpoint import hashing

if TYPE_CHECKING:
    from gemma4_moe.layout.dtypes import DType

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements are looked at at once.
_PIECE = 2**20


def can_overflow(source: DType, target: DType) -> bool:
    """Say whether a finite value of `source` can lie beyond the largest of `target`, or be rounded beyond it."""
    old, new = source.float_format, target.float_format
    if old is None or new is None:
        return False
    return (old.max_exponent, old.precision) > (new.max_exponent, new.precision)


def overflows_by_chunk(source: Array, result: Array, start: int, end: int, position: int) -> Counter[int]:
    """Return how many infinities whose element of `source` is finite lie in each chunk of a file.

    Args:
        source: What was cast.
        result: The same elements at the same places, C-contiguous, of two bytes each.
        start: The first byte of the file that counts.
        end: The byte after the last that does.
        position: Where in the file `result` begins.
    """
    found: Counter[int] = Counter()
    flat = result.reshape(-1).view(np.uint16)
    infinity = np.array(np.inf, result.dtype).view(np.uint16) << 1  # without its sign
    first, last = ((byte - position) // result.itemsize for byte in (start, end))
    for place in range(first, last, _PIECE):
        infinite = place + np.flatnonzero(flat[place : min(place + _PIECE, last)] << 1 == infinity)
        if infinite.size:
            new = infinite[np.isfinite(source[np.unravel_index(infinite, result.shape)])]
            found.update(((position + new * result.itemsize) // hashing.CHUNK_BYTES).tolist())
    return found
