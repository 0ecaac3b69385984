"""A limit on what Python's own allocator gives out."""

import tracemalloc
from contextlib import contextmanager


@contextmanager
def memory_below(limit, *, above=0):
    """Require that the block's peak, in bytes, is between the two."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert above < peak < limit
