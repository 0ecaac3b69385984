"""The space on the disk that a conversion needs, and the space that is free."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.storage import refusals, regular_status
from gemma4_moe.hub.remote import bytes_to_fetch, cache_directory
from gemma4_moe.target.recovery import remains

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.plan import Plan


class Space(NamedTuple):
    """The space that a conversion needs and the space that is free, in bytes.

    Attributes:
        target_bytes: Bytes that the target still needs: its size, less what an unfinished run has on the disk already.
        free_bytes: Free space on the disk that would hold the target.
        cache_bytes: Size of the weights that would be downloaded into the Hub's cache first.
        cache_free_bytes: Free space on another disk that holds this cache; None if no such disk is needed.
    """

    target_bytes: int
    free_bytes: int
    cache_bytes: int = 0
    cache_free_bytes: int | None = None

    @property
    def missing_bytes(self) -> int:
        """How much more space is needed than is free; 0 if all fits."""
        if self.cache_free_bytes is None:
            return max(0, self.target_bytes + self.cache_bytes - self.free_bytes)
        return self.missing_without_cache + max(0, self.cache_bytes - self.cache_free_bytes)

    @property
    def missing_without_cache(self) -> int:
        """How much would be missing if the source were streamed."""
        return max(0, self.target_bytes - self.free_bytes)


def space_for(plan: Plan, sources: Sequence[Checkpoint], target: Path | None, disk: Path, *, stream: bool) -> Space:
    """Return the space for a conversion to `target` on the disk of the directory `disk`; the source is the first.

    The space that an unfinished run to `target` has already is not needed again.
    """
    begun = None if target is None else remains(target)
    copied = sum(regular_status(path).st_size for path in sources[0].side_files)
    needed = max(0, plan.target_bytes + copied - (0 if begun is None else begun.nbytes))
    return measure_space(sources, needed, disk, stream=stream)


def measure_space(sources: Iterable[Checkpoint], target_bytes: int, disk: Path, *, stream: bool) -> Space:
    """Return the space for a target on the disk of the directory `disk`, and for sources in the Hub's cache."""
    with refusals("ask for the free space", disk):
        free = shutil.disk_usage(disk).free
        device = disk.stat().st_dev
    to_fetch = 0 if stream else sum(bytes_to_fetch(source) for source in sources)
    if not to_fetch:
        return Space(target_bytes, free)
    cache = cache_directory()
    with refusals("ask for the free space", cache):
        cache = next(path for path in (cache, *cache.parents) if path.exists())
        other = cache.stat().st_dev != device
        return Space(target_bytes, free, to_fetch, shutil.disk_usage(cache).free if other else None)
