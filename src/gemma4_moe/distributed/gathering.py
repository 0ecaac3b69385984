"""Gathers: the shards of a tensor, converted, at their places in the whole tensor on every rank.

A gather goes along one dimension of the mesh after the other, as `sharding.gather_plan` says. It takes one of three
roads:

- packed: small tensors whose rows (axis 0, the experts of an expert tensor) one dimension cuts travel together.
- in place, on a GPU: a rank converts its rows straight into the whole tensor, where they are gathered. Shards of an
  inner axis are gathered in the source's layout, some rows at a time, and converted into place. Collectives are
  asynchronous: while one tensor is on the wire, the next is converted.
- staged, on a CPU: values reach their places through a small buffer, since gloo would gather into memory of its own, as
  large as the result.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.distributed.collectives import ALL_GATHER
from gemma4_moe.distributed.packing import Pack, Packed, copy, copy_all
from gemma4_moe.distributed.placements import Placed, as_bytes, take
from gemma4_moe.distributed.ranks import failing_in_words
from gemma4_moe.distributed.sharding import GatherPlan, Step, count, gather_plan, overlaps, part_of
from gemma4_moe.layout.table import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.distributed.packing import Convert, Runs

#: The most bytes of staging that a gather takes on a CPU by default. More is slower: it falls out of the caches, and
#: its pages are new to the process. See docs/benchmarks.md.
STAGING_BYTES = 16 * 2**20

#: The most bytes of tensors that travel together on a GPU, where larger ones are gathered in place.
PACKED_BYTES = 128 * 2**20

#: Devices whose collectives write to their place in the result, and run beside kernels.
IN_PLACE_DEVICES = {"cuda"}

#: The least bytes that travel at a time along an inner axis, if the tensor has as many.
_BLOCK_BYTES = 64 * 2**20

#: How many collectives may run before the first is waited for.
_AHEAD = 2


class Gatherer:
    """Gathers tensors one after the other. The ranks of a mesh add the same ones; `finish` completes them.

    Args:
        staging_bytes: The most bytes of staging on a CPU, unless one row on all ranks of a dimension is larger.
    """

    def __init__(self, staging_bytes: int = STAGING_BYTES) -> None:
        self._staging_bytes = staging_bytes
        self._packs: dict[tuple[DeviceMesh, int], Pack] = {}
        self._running: deque[tuple[list[Any], Callable[[], None] | None]] = deque()

    def add(
        self,
        local: torch.Tensor,
        where: Placed,
        out: torch.Tensor,
        convert: Convert,
        operation: Operation = Operation.KEEP,
        window: tuple[int, int] | None = None,
    ) -> None:
        """Gather a tensor, or some of its rows, into `out`.

        Args:
            local: This rank's shard, in the source's layout.
            where: The mesh and the placements of the source.
            out: Memory of the result in the target's layout; the rows of a window may be apart from each other.
            convert: Writes rows of the source to such of the target.
            operation: What `convert` does to the axes.
            window: The tensor's row that is the first of `out`, and the number of all its rows. By default `out` has
                them all.
        """
        first, size = (0, len(out)) if window is None else window
        moved, mesh_shape = where.converted(operation, local.ndim), tuple(where.mesh.shape)
        shape, some = (size, *out.shape[1:]), (first, first + len(out))
        plan = gather_plan(shape, mesh_shape, tuple(where.coordinate), moved.placements, some)
        rows = local[plan.positions.start : plan.positions.stop]
        in_place = out.device.type in IN_PLACE_DEVICES
        most = PACKED_BYTES if in_place else self._staging_bytes
        if not plan.steps:
            convert(rows, out)
        elif len(plan.steps) == 1 and not where.inner_dims and out.nbytes <= most and not plan.steps[0].lopsided:
            self._pack(where.mesh, plan.steps[0], Packed(rows, out, convert), most)
        elif in_place and (axis := _evenly_cut_axis(where, moved, local, out)) is not None:
            self._gather_blocks(where, plan, rows, out, convert, axis)
        else:
            _convert_own(rows, plan.own, out, convert)
            self._take(where.mesh, plan.steps, out)

    def finish(self) -> None:
        """Complete all results, for work that is put on the current stream after this call."""
        for key in list(self._packs):
            self._send(self._packs.pop(key))
        while self._running:
            self._finish_first()

    def _push(self, works: list[Any], finish: Callable[[], None] | None = None) -> None:
        """Let collectives run, and call `finish` once they are complete."""
        self._running.append((works, finish))
        while len(self._running) > _AHEAD:
            self._finish_first()

    def _finish_first(self) -> None:
        works, finish = self._running.popleft()
        for work in works:
            with failing_in_words("gather a tensor"):
                work.wait()
        if finish is not None:
            finish()

    def _take(self, mesh: DeviceMesh, steps: Sequence[Step], out: torch.Tensor) -> None:
        """Make what is left of `out` whole along one dimension after the other."""
        step, *rest = steps
        group, own = mesh.get_group(step.dim), mesh.get_local_rank(step.dim)
        rows, in_place = step.rows, out.device.type in IN_PLACE_DEVICES
        if step.whole_rows and in_place and step.even and out.is_contiguous():
            mine = out[rows[own][0].start : rows[own][0].stop]
            whole = out[rows[0][0].start : rows[-1][0].stop]
            with failing_in_words("gather a tensor"):
                self._push([ALL_GATHER(as_bytes(whole), as_bytes(mine), group, async_op=True)])
        elif step.whole_rows and (in_place or step.lopsided):
            self._relay(out, rows, own, group)
        else:
            _exchange(out, step.held, own, group, self._staging_bytes)
        if rest:
            self._push([], partial(self._take, mesh, rest, out))

    def _relay(self, out: torch.Tensor, held: Sequence[Runs], own: int, group: Any) -> None:
        """Send each rank's rows, unevenly many or apart from each other, to all others of its group."""
        apart = not out.is_contiguous()
        row_bytes = max(1, out[:1].numel() * out.element_size())
        block = max(1, _BLOCK_BYTES // row_bytes) if apart else len(out)
        for start in range(0, len(out), block):
            works, copies = [], []
            for rank, runs in enumerate(held):
                for _, run in overlaps(runs, start, start + block):
                    rows = out[run.start : run.stop]
                    sent = rows.contiguous() if rank == own else rows.new_empty(rows.shape) if apart else rows
                    with failing_in_words("gather a tensor"):
                        works.append(dist.broadcast(as_bytes(sent), group=group, group_src=rank, async_op=True))
                    if apart and rank != own:
                        copies.append((rows, sent))
            self._push(works, partial(copy_all, copies))

    def _gather_blocks(
        self, where: Placed, plan: GatherPlan, rows: torch.Tensor, out: torch.Tensor, convert: Convert, axis: int
    ) -> None:
        """Gather the shards of one inner axis in the source's layout, and convert them into place.

        `axis` is the axis of `out` that they cut.
        """
        (dim,), (_, *rest) = where.inner_dims, plan.steps
        group, ranks = where.mesh.get_group(dim), where.mesh.size(dim)
        row_bytes = max(1, ranks * prod(rows.shape[1:]) * rows.element_size())
        block = max(-(-plan.most_rows // 2), min(plan.most_rows, _BLOCK_BYTES // row_bytes), 1)
        for start in range(0, plan.most_rows, block):  # as many blocks on all ranks, though some may be empty
            part, works, finish = rows[start : start + block], [], None
            if len(part):
                slot = part.new_empty((ranks, *part.shape))
                with failing_in_words("gather a tensor"):
                    works = [ALL_GATHER(as_bytes(slot), as_bytes(part), group, async_op=True)]
                runs = part_of(plan.own[0], start, start + len(part))
                finish = partial(_unfold, slot, runs, axis, out, convert)
            self._push(works, finish)
        if rest:
            self._push([], partial(self._take, where.mesh, rest, out))

    def _pack(self, mesh: DeviceMesh, step: Step, packed: Packed, most: int) -> None:
        key = (mesh, step.dim)
        if key in self._packs and self._packs[key].bytes_of_all + packed.out.nbytes > most:
            self._send(self._packs.pop(key))
        if key not in self._packs:
            self._packs[key] = Pack(mesh.get_group(step.dim), mesh.get_local_rank(step.dim), len(step.held))
        self._packs[key].add(packed, step)

    def _send(self, pack: Pack) -> None:
        send = pack.filled()
        received = send.new_empty((pack.ranks, len(send)))
        with failing_in_words("gather tensors"):
            work = ALL_GATHER(received.view(-1), send, pack.group, async_op=True)
        self._push([work], partial(pack.unpack, received))


def gather(
    local: torch.Tensor,
    where: Placed,
    shape: Sequence[int],
    staging_bytes: int = STAGING_BYTES,
) -> torch.Tensor:
    """Return a tensor of `shape` whole on every rank of its mesh, which all call with their shards of it."""
    if not where.is_cut:
        return local
    whole = torch.empty(tuple(shape), dtype=local.dtype, device=local.device)
    gatherer = Gatherer(staging_bytes)
    gatherer.add(local, where, whole, copy)
    gatherer.finish()
    return whole


def _evenly_cut_axis(where: Placed, moved: Placed, local: torch.Tensor, out: torch.Tensor) -> int | None:
    """Return the axis of `out` that one dimension alone of the mesh cuts into equal and contiguous parts, or None."""
    if len(where.inner_dims) != 1 or not local.is_contiguous():
        return None
    (dim,) = where.inner_dims
    before, after = where.placements[dim], moved.placements[dim]
    assert before is not None and after is not None, "a dimension that cuts"  # noqa: PT018
    equal = local.shape[before.axis] * where.mesh.size(dim) == out.shape[after.axis]
    return after.axis if equal and before.split_factor == 1 else None


def _convert_own(rows: torch.Tensor, own: Sequence[Runs], out: torch.Tensor, convert: Convert) -> None:
    """Write this rank's part of `out`."""
    if all(len(runs) == 1 for runs in own):
        convert(rows, out[tuple(slice(runs[0].start, runs[0].stop) for runs in own)])
    elif all(own):
        shard = out.new_empty([count(runs) for runs in own])
        convert(rows, shard)
        _place(shard, own, out)


def _unfold(slot: torch.Tensor, runs: Runs, axis: int, out: torch.Tensor, convert: Convert) -> None:
    """Convert [ranks, rows, ...] into the rows `runs` of `out`, whose `axis` the ranks cut."""
    for run in runs:
        part, slot = slot[:, : len(run)], slot[:, len(run) :]
        place = out[run.start : run.stop].unflatten(axis, (len(part), -1)).movedim(axis, 1)  # type: ignore[no-untyped-call]
        convert(part.transpose(0, 1), place)


def _exchange(whole: torch.Tensor, held: Sequence[Sequence[Runs]], own: int, group: Any, staging_bytes: int) -> None:
    """Exchange the values that each rank of a group holds, block by block."""
    most_rows = max(count(runs[0]) for runs in held)
    row_elements = max(prod(map(count, runs[1:])) for runs in held)
    row_bytes = max(1, row_elements * whole.element_size() * (len(held) + 1))
    step = max(1, min(most_rows, staging_bytes // row_bytes))
    staging = whole.new_empty((len(held), step * row_elements))
    send = whole.new_empty(step * row_elements)
    for first in range(0, most_rows, step):
        blocks = [(part_of(runs[0], first, first + step), *runs[1:]) for runs in held]
        mine = take(whole, blocks[own])
        send[: mine.numel()].view(mine.shape).copy_(mine)
        with failing_in_words("gather a tensor"):  # as bytes, which every backend can move, whatever the dtype
            ALL_GATHER(as_bytes(staging), as_bytes(send), group)
        for rank, block in enumerate(blocks):
            if rank != own:
                sizes = [count(runs) for runs in block]
                _place(staging[rank, : prod(sizes)].view(sizes), block, whole)


def _place(values: torch.Tensor, runs: Sequence[Runs], whole: torch.Tensor) -> None:
    """Copy values into `whole` at `runs` of each axis: the inverse of `take`."""
    for axis, own in enumerate(runs):
        if len(own) != 1:
            for run, piece in zip(own, torch.split(values, [len(run) for run in own], axis), strict=True):
                _place(piece, [*runs[:axis], (run,), *runs[axis + 1 :]], whole)
            return
    whole[tuple(slice(own[0].start, own[0].stop) for own in runs)].copy_(values)
