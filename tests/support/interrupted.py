"""A conversion of a small model that is interrupted once something of it is journalled, and one that goes on."""

import pytest

from gemma4_moe import convert
from gemma4_moe.target.recovery import remains

Resumed = list[tuple[int, int]]


def interrupt(source, target, after=40_000):
    def stop(done, total):
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_size=60_000, max_memory=60_000, progress=stop)
    assert not target.exists()
    left = remains(target)
    assert left is not None
    assert left.resumable
    assert left.nbytes > after


def resume(source, target, **options):
    seen = []
    options = {"max_shard_size": 60_000, "resume": True} | options
    convert(source, target, progress=lambda done, total: seen.append((done, total)), **options)
    assert remains(target) is None
    return seen
