"""Say what a conversion would do, before it is begun: the plan, the memory, and the space."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.storage import resolved
from gemma4_moe.converter.blocks import DEFAULT_MEMORY, Memory, plan_memory
from gemma4_moe.converter.notes import cast_notes
from gemma4_moe.converter.plan import DEFAULT_SHARD_SIZE, Plan, make_plan
from gemma4_moe.converter.space import Space, measure_space
from gemma4_moe.hub.source import check_streamed, is_hub_id, open_headers
from gemma4_moe.sizes import parse_size

if TYPE_CHECKING:
    from gemma4_moe.layout.table import Layout


@dataclass(frozen=True, slots=True)
class Preview:
    """What `convert` would do with a source.

    Attributes:
        source: The directory, or the Hub id.
        plan: The plan.
        memory: The buffers that it would use.
        source_tensors: Number of tensors of the source.
        source_bytes: Their size.
        space: The space that it would need, and what there is.
        side_files: Names of the files that would be taken along unchanged.
        left_behind: Names in the source directory that would not.
        notes: What is to be known of the values: casts that round, and tensors that are not cast.
    """

    source: Path
    plan: Plan
    memory: Memory
    source_tensors: int
    source_bytes: int
    space: Space
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    notes: tuple[str, ...]


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
) -> Preview:
    """Say what `convert` would do, from headers alone: of a model on the Hub, no weights are fetched.

    Args:
        source: A directory, or a Hub id.
        target: Where it would be written; by default beside the source, or for a Hub id in the working directory. Only
            its disk's free space is looked at.
        to: See `convert`, as for the others.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`.
        revision: Branch, tag or commit of a Hub id.
        stream: Say what `convert` would do with it: it needs no space for a model in the Hub's cache.
        base: See `convert`.

    Raises:
        InputError, UsageError, StorageError: What `convert` would raise before it writes.
    """
    beside = resolved(Path() if is_hub_id(source) else Path(source))
    disk = beside if target is None else resolved(Path(target)).parent
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
            left_behind=checkpoint.left_behind,
            notes=cast_notes(planned),
        )
