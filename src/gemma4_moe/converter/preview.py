"""The preview of a conversion: its plan, its memory, its space, and the share of each rank of a mesh."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals, resolved
from gemma4_moe.converter.blocks import DEFAULT_MEMORY, Memory, plan_memory
from gemma4_moe.converter.mesh_preview import Prediction, parse_mesh, predict
from gemma4_moe.converter.notes import cast_notes
from gemma4_moe.converter.plan import Plan, make_plan
from gemma4_moe.hub.remote import bytes_to_fetch, cache_directory
from gemma4_moe.hub.source import check_streamed, is_hub_id, open_headers
from gemma4_moe.sizes import format_size, parse_size
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.layout.table import Layout


@dataclass(frozen=True, slots=True, repr=False)
class Preview:
    """The result of `plan`.

    Attributes:
        source: The directory, or the Hub id.
        plan: The plan.
        memory: The buffers that `convert` would use.
        source_tensors: Number of tensors of the source.
        source_bytes: Their size.
        space: The space that is needed, and the space that is free.
        side_files: Names of the files that would be copied.
        skipped: Names in the source directory that would not.
        notes: Notes on the values: casts that round, and tensors that are not cast.
        mesh: The share of each rank of the mesh, or None if no mesh was given.
    """

    source: Path
    plan: Plan
    memory: Memory
    source_tensors: int
    source_bytes: int
    space: Space
    side_files: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    mesh: Prediction | None = None

    def __repr__(self) -> str:
        plan = self.plan
        source = f"{self.source}: {plan.source_layout} ({plan.spelling}), {self.source_tensors:,} tensors"
        target = f"{plan.target_layout}, {len(plan.tensors):,} tensors, {len(plan.files)} files"
        return f"<Preview of {source} → {target}, {format_size(plan.target_bytes)}>"


def plan(
    source: str | Path,
    target: str | Path | None = None,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    revision: str | None = None,
    stream: bool = False,
    base: str | Path | None = None,
    mesh: Mapping[str, int] | str | None = None,
) -> Preview:
    """Return what `convert` would do, from headers alone: of a model on the Hub, no weights are fetched.

    Args:
        source: A directory, or a Hub id.
        target: The directory that would be made; by default one beside the source, or for a Hub id one in the working
            directory. Only its disk's free space is read.
        to: See `convert`.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`.
        revision: Branch, tag or commit of a Hub id.
        stream: See `convert`; no space is then needed for a model in the Hub's cache.
        base: See `convert`.
        mesh: Ranks by dimension, or text such as "ep_shard=2,ep=8": also preview the share of each of these ranks, if
            they load the source into the nemo layout.

    Raises:
        InputError, UsageError, StorageError: What `convert` would raise before it writes.
    """
    ranks = None if mesh is None else parse_mesh(mesh)
    beside = resolved(Path() if is_hub_id(source) else expanded(source))
    disk = beside if target is None else resolved(expanded(target)).parent
    if stream:
        check_streamed(source, base)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_headers(source, revision))
        opened = None if base is None else stack.enter_context(open_headers(base))
        planned = make_plan(checkpoint, to=to, dtype=dtype, max_shard_size=max_shard_size, base=opened)
        return Preview(
            source=Path(source),
            plan=planned,
            memory=plan_memory(planned, parse_size(max_memory)),
            source_tensors=len(checkpoint.tensors),
            source_bytes=checkpoint.total_bytes,
            space=measure_space(
                [checkpoint, *([] if opened is None else [opened])], planned.target_bytes, disk, stream=stream
            ),
            side_files=tuple(file.name for file in checkpoint.side_files),
            skipped=checkpoint.skipped,
            notes=cast_notes(planned),
            mesh=None if ranks is None else predict(planned, ranks),
        )


@dataclass(frozen=True, slots=True)
class Space:
    """The space that a conversion needs and the space that is free, in bytes.

    Attributes:
        target_bytes: Size of the target's weights.
        free_bytes: Free space on the disk that would hold the target.
        cache_bytes: Size of the weights that would be brought into the Hub's cache first.
        cache_free_bytes: Free space on another disk that holds this cache; None if the target's disk holds it too, or
            nothing is brought there.
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


def measure_space(sources: Iterable[Checkpoint], target_bytes: int, disk: Path, *, stream: bool) -> Space:
    """Return the space for a target of `target_bytes` on the disk of the directory `disk`.

    Args:
        sources: The source and the base, opened for their headers.
        target_bytes: Size of the target's weights.
        disk: The directory that would hold the target.
        stream: Whether models on the Hub would be read there, and not brought into its cache.

    Raises:
        StorageError: The disk or its permissions refused.
    """
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
