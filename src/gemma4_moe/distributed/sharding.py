"""The indices of an axis that a rank holds: DTensor's rules as a formula, without torch.

The dimensions of a mesh are applied from left to right. `Shard` cuts the remaining indices as `torch.chunk` does: the
first chunks have ceil(size / ranks) of them, the last may be short or empty. `StridedShard` (FSDP over an axis that is
sharded further right already) cuts them into `split_factor` pieces first, and takes a chunk of each piece.

A run is a range of consecutive indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

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


class Step(NamedTuple):
    """A gather along one dimension of a mesh.

    Attributes:
        dim: The dimension.
        held: For each of its ranks the indices of each axis that it holds before, once earlier steps are done.
        rows: Those of axis 0.
        whole_rows: Whether ranks hold all of every other axis.
        even: Whether they hold equally many rows, each those that follow the rank's before.
        lopsided: Whether equal parts for all would be more than twice as many rows as there are.
    """

    dim: int
    held: tuple[tuple[tuple[range, ...], ...], ...]
    rows: tuple[tuple[range, ...], ...]
    whole_rows: bool
    even: bool
    lopsided: bool


class GatherPlan(NamedTuple):
    """How a rank's shard of a tensor, or of some of its rows, becomes whole. Rows count from the first that is wanted.

    Attributes:
        positions: The rows of the shard, counted in it, that are wanted.
        own: The indices of each axis that the rank holds.
        most_rows: The most wanted rows that a rank has in a row of the mesh's ranks.
        steps: Those that cut inner axes first, then those that cut rows, in the order that makes rows consecutive.
    """

    positions: range
    own: tuple[tuple[range, ...], ...]
    most_rows: int
    steps: tuple[Step, ...]


@lru_cache(maxsize=4096)
def gather_plan(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
    window: tuple[int, int],
) -> GatherPlan:
    """Return how the rank at `coordinate` gathers the rows (start, end) of a tensor of `shape`."""
    ranks = [range(size) for size in mesh_shape]
    cutting = {dim: p for dim, p in enumerate(placements) if p is not None and mesh_shape[dim] > 1}
    inner = [dim for dim in reversed(cutting) if cutting[dim].axis != 0]
    rows = [dim for dim in reversed(cutting) if cutting[dim].axis == 0]
    rows.sort(key=lambda dim: cutting[dim].split_factor == 1)  # a strided dimension cuts what those to its right left

    def step(dim: int, each: tuple[tuple[tuple[range, ...], ...], ...]) -> Step:
        rows = tuple(runs[0] for runs in each)
        counts = [count(runs) for runs in rows]
        whole = all(count(runs) == size for own in each for runs, size in zip(own[1:], shape[1:], strict=True))
        even = len(set(counts)) == 1 and all(len(runs) == 1 for runs in rows)
        even = even and all(a[0].stop == b[0].start for a, b in pairwise(rows))
        return Step(dim, each, rows, whole, even, len(rows) * max(counts) > 2 * (window[1] - window[0]))

    def held(among: Sequence[Sequence[int]]) -> tuple[tuple[range, ...], ...]:
        found = []
        for axis, size in enumerate(shape):
            runs = {run for at in product(*among) for run in local_runs(size, axis, mesh_shape, at, placements)}
            found.append(joined(sorted(runs, key=lambda run: run.start)))
        wanted = [common for _, common in overlaps(found[0], *window)]
        return tuple(range(run.start - window[0], run.stop - window[0]) for run in wanted), *found[1:]

    here: list[Sequence[int]] = [[own] for own in coordinate]
    own_rows = local_runs(shape[0], 0, mesh_shape, coordinate, placements)
    positions = [position for position, _ in overlaps(own_rows, *window)]
    own, steps = held(here), []
    for dim in (*inner, *rows):
        steps.append(step(dim, tuple(held([*here[:dim], [rank], *here[dim + 1 :]]) for rank in ranks[dim])))
        here[dim] = ranks[dim]
    everywhere = [held([[own] for own in at])[0] for at in product(*ranks)]
    return GatherPlan(
        range(positions[0].start, positions[-1].stop) if positions else range(0),
        own,
        max(map(count, everywhere)),
        tuple(steps),
    )


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
