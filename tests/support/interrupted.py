"""A conversion of a small model that is interrupted once something of it is journalled, and one that goes on."""

from contextlib import contextmanager

import pytest

from gemma4_moe import convert
from gemma4_moe.target import journal
from gemma4_moe.target.recovery import remains


@contextmanager
def counted_writes(stop_after=None):
    """Give a list of the bytes of each block that is written, and interrupt the run after `stop_after` bytes."""
    written, whole = [], journal.Ledger.wrote

    def wrote(ledger, file, piece):
        whole(ledger, file, piece)
        written.append(piece.size)
        if stop_after is not None and sum(written) > stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal.Ledger, "wrote", wrote)
        yield written


def interrupt(source, target, after=40_000):
    def stop(done, total):
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_size=60_000, max_memory=60_000, progress=stop)
    assert not target.exists()
    left = remains(target)
    assert left is not None
    assert left.command is not None
    assert left.nbytes > after


def resume(source, target, **options):
    """Resume a conversion, and return how many bytes it wrote."""
    seen = []
    options = {"max_shard_size": 60_000, "resume": True} | options
    with counted_writes() as written:
        convert(source, target, progress=lambda done, total: seen.append((done, total)), **options)
    assert remains(target) is None
    assert seen == sorted(seen)
    assert all(done <= total for done, total in seen)
    return sum(written)
