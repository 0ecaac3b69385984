"""A conversion of a small model that is interrupted once something of it is journalled, and one that goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gemma4_moe import convert
from gemma4_moe.target.recovery import remains

if TYPE_CHECKING:
    from pathlib import Path

Resumed = list[tuple[int, int]]


def interrupt(source: Path, target: Path, after: int = 40_000) -> None:
    def stop(done: int, total: int) -> None:
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_size=60_000, max_memory=60_000, progress=stop)
    assert not target.exists()
    left = remains(target)
    assert left is not None
    assert left.resumable
    assert left.nbytes > after


def resume(source: Path, target: Path, **options: object) -> Resumed:
    seen: Resumed = []
    options = {"max_shard_size": 60_000, "resume": True} | options
    convert(source, target, progress=lambda done, total: seen.append((done, total)), **options)  # type: ignore[arg-type]
    assert remains(target) is None
    return seen
