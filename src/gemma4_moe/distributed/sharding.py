"""The indices of an axis that a rank holds: DTensor's rules as a formula, without torch.

The dimensions of a mesh are applied from left to right. `Shard` cuts the remaining indices as `torch.chunk` does: the
first chunks have ceil(size / ranks) of them, the last may be short or empty. `StridedShard` (FSDP over an axis that is
sharded further right already) cuts them into `split_factor` pieces first, and takes a chunk of each piece.

A run is a range of consecutive indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Sharded:
    """The placement of a mesh dimension that cuts an axis, counted from the front."""

    axis: int
    split_factor: int = 1  # for `StridedShard`, the number of pieces that it cuts first


#: A mesh dimension cuts one axis of a tensor, or none (None: each rank has a replica).
Placement = Sharded | None

#: The placements of NeMo AutoModel's native expert tensors, by the name of the mesh dimension. Axis 0 is E; axis 1 is H
#: of `gate_and_up_projs` and I of `down_projs`.
NAMED_DIMENSIONS: dict[str, Placement] = {
    "ep": Sharded(0),
    "ep_shard": Sharded(1),
    "dp_shard": Sharded(0),
    "dp_shard_cp": Sharded(0),
    "ep_replicate": None,
    "dp_replicate": None,
}


def local_runs(
    size: int, axis: int, mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[range, ...]:
    """Return the indices of an axis that the rank at `coordinate` holds, as non-empty runs."""
    runs = [range(size)]
    for ranks, index, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement is not None and placement.axis == axis:
            pieces = [_chunk(runs, placement.split_factor, number) for number in range(placement.split_factor)]
            runs = [run for piece in pieces for run in _chunk(piece, ranks, index)]
    return joined(runs)


def count(runs: Iterable[range]) -> int:
    """Return the number of indices in all runs together."""
    return sum(map(len, runs))


def _chunk(runs: Sequence[range], chunks: int, number: int) -> list[range]:
    """Return chunk `number` of `chunks` of a sequence of indices, sized as `torch.chunk` sizes them."""
    step = -(-count(runs) // chunks)
    return list(part_of(runs, number * step, (number + 1) * step))


def part_of(runs: Sequence[range], first: int, last: int) -> tuple[range, ...]:
    """Return the indices at positions [first, last) of a sequence of indices."""
    part = []
    before = 0
    for run in runs:
        piece = run[max(first - before, 0) : max(last - before, 0)]
        if piece:
            part.append(piece)
        before += len(run)
    return tuple(part)


def overlaps(runs: Iterable[range], start: int, end: int) -> Iterator[tuple[slice, range]]:
    """Yield the indices of (start, end) among those that `runs` hold: their positions there, and the indices.

    A run whose indices are all outside gives nothing.
    """
    before = 0
    for run in runs:
        common = range(max(run.start, start), min(run.stop, end))
        if common:
            position = before + common.start - run.start
            yield slice(position, position + len(common)), common
        before += len(run)


def joined(runs: Sequence[range]) -> tuple[range, ...]:
    """Return runs, with each two that continue each other joined into one."""
    if not runs:
        return ()
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(runs)) if a.stop != b.start), len(runs)]
    return tuple(range(runs[a].start, runs[b - 1].stop) for a, b in pairwise(starts))
