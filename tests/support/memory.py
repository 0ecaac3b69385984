"""A limit on what Python's own allocator gives out."""

from __future__ import annotations

import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def memory_below(limit: int, *, above: int = 0) -> Iterator[None]:
    """Require that the block's peak, in bytes, is between the two."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert above < peak < limit
