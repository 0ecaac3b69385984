"""Write one tensor of a stream into given memory: converted, cast and, where ranks share it, gathered."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.collectives import broadcast, gather
from gemma4_moe.distributed.placements import Placed, local_of, placed
from gemma4_moe.distributed.sharding import Sharded
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import Operation, transposes
from gemma4_moe.refit.buckets import unpack

if TYPE_CHECKING:
    from gemma4_moe.refit.buckets import Bucket, Run
    from gemma4_moe.refit.items import Item

#: From this size on a copy of its own is faster than its part of a common launch, which reaches 3/4 of the memory's
#: speed on an H100.
_OWN_LAUNCH_BYTES = 4 << 20


class Filler:
    """Fills the tensors of one pass.

    Args:
        kernel: The kernel that converts.
        keeps: Whether this rank keeps the results. If not, it does only what other ranks need of it.
    """

    def __init__(self, kernel: str, *, keeps: bool) -> None:
        self._kernel = kernel
        self._keeps = keeps
        self._owners: dict[Placed, list[tuple[tuple[int, ...], int]]] = {}
        self._outs: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []

    def fill(self, item: Item, value: torch.Tensor, out: torch.Tensor) -> None:
        """Write one item, made from `value`, into `out`, a contiguous tensor of its shape and dtype.

        What is small and only copied waits for `flush`. All ranks of a DTensor's mesh must call.

        Raises:
            ParallelError: A collective failed, or a placement is not known.
        """
        if item.operation is Operation.FOLD:
            out.fill_(1)
            return
        where = placed(value, item.native) if isinstance(value, DTensor) else None
        local = local_of(value)
        if where is None or not _cuts(where):
            small = item.operation is Operation.KEEP and local.dtype == out.dtype and item.nbytes < _OWN_LAUNCH_BYTES
            if self._keeps and small:
                self._outs.append(out)
                self._sources.append(local)
            elif self._keeps:
                self._convert(item, _part(local if item.part.expert is None else local[item.part.expert], item), out)
        elif item.part == WHOLE:
            moved = where.converted(item.operation, value.ndim)
            part = out.new_empty(moved.local_shape(item.shape))
            self._convert(item, local, part)
            gather(part, moved, item.shape, out=out)
        elif item.part.expert is None:
            self._fill_rows(item, tuple(value.shape), local, where, out)
        else:
            self._fill_expert(item, tuple(value.shape), local, where, out)

    def fill_run(self, run: Run, value: torch.Tensor, bucket: Bucket) -> None:
        """Write a run of items, all made from `value`, to their places in a bucket.

        Errors are those of `fill`.
        """
        items = run.items
        if items[0].part.expert is None:
            self.fill(items[0], value, bucket.place_of(run))
        elif not alone(value, items[0].native):
            for item, (_, out) in zip(items, unpack(bucket.buffer, run.entries), strict=True):
                self.fill(item, value, out)
        elif self._keeps:
            first, last = items[0].part.expert, items[-1].part.expert
            assert first is not None and last is not None, "a run of experts"  # noqa: PT018
            self._convert(items[0], _part(local_of(value)[first : last + 1], items[0]), bucket.place_of(run))

    def flush(self) -> None:
        """Make all small copies that wait, together: each launch takes time."""
        if self._outs:
            torch._foreach_copy_(self._outs, self._sources)
            self._outs, self._sources = [], []

    def _convert(self, item: Item, source: torch.Tensor, out: torch.Tensor) -> None:
        if transposes(item.operation):
            transpose_scale_cast(source, out=out, kernel=self._kernel)
        elif source.dtype == out.dtype:
            out.copy_(source)
        else:
            if out.ndim == 0:
                source, out = source.view(1), out.view(1)
            scale_cast(source, out=out, kernel=self._kernel)

    def _fill_expert(
        self, item: Item, shape: tuple[int, ...], local: torch.Tensor, where: Placed, out: torch.Tensor
    ) -> None:
        """Write one expert's part on the ranks that own it, and give it to the others."""
        assert item.part.expert is not None, "an item of one expert"
        owner, position = self._owners_of(where, shape[0])[item.part.expert]
        outer = [dim for dim, placement in enumerate(where.placements) if placement is not None and placement.axis == 0]
        coordinate = where.mesh.get_coordinate()
        assert coordinate is not None, "a rank that holds a DTensor is in its mesh"
        if all(coordinate[dim] == owner[dim] for dim in outer):
            self._fill_owned(item, shape, local[position], where, out)
        broadcast(out, where, owner)

    def _fill_owned(
        self, item: Item, shape: tuple[int, ...], local: torch.Tensor, where: Placed, out: torch.Tensor
    ) -> None:
        """Write one expert's part, of which each rank has `local` [rows, columns] in native layout."""
        inner = tuple(
            None if p is None or p.axis == 0 else Sharded(2 - p.axis, p.split_factor) for p in where.placements
        )
        along = Placed(where.mesh, inner)
        if not _cuts(along):
            self._convert(item, _part(local, item), out)
        elif any(p is not None and p.axis == 0 for p in inner) and item.part.slots > 1:
            # Gate and up lie on different ranks: the expert is gathered whole.
            part = out.new_empty(local.shape[1], local.shape[0])
            self._convert(item, local, part)
            start, end = item.part.rows(shape[2])
            out.copy_(gather(part, along, (shape[2], shape[1]))[start:end])
        else:
            mine = _part(local, item)
            part = out.new_empty(mine.shape[1], mine.shape[0])
            self._convert(item, mine, part)
            gather(part, along, item.shape, out=out)

    def _fill_rows(
        self, item: Item, shape: tuple[int, ...], local: torch.Tensor, where: Placed, out: torch.Tensor
    ) -> None:
        """Write a run of rows of all experts, of which each rank has `local` in native layout."""
        moved = where.converted(item.operation, len(shape))
        if any(p is not None and p.axis == 1 for p in moved.placements):
            # Gate and up lie on different ranks: the experts are gathered whole.
            part = out.new_empty(moved.local_shape((shape[0], shape[2], shape[1])))
            self._convert(item, local, part)
            start, end = item.part.rows(shape[2])
            out.copy_(gather(part, moved, (shape[0], shape[2], shape[1]))[:, start:end])
        else:
            part = out.new_empty(moved.local_shape(item.shape))
            self._convert(item, _part(local, item), part)
            gather(part, moved, item.shape, out=out)

    def _owners_of(self, where: Placed, experts: int) -> list[tuple[tuple[int, ...], int]]:
        """Return, for each expert, where in the mesh it is and its position there."""
        if where not in self._owners:
            outer = {dim for dim, p in enumerate(where.placements) if p is not None and p.axis == 0}
            found: dict[int, tuple[tuple[int, ...], int]] = {}
            for place in product(*(range(where.mesh.size(d)) if d in outer else (0,) for d in range(where.mesh.ndim))):
                held = [expert for run in where.runs((experts,), place)[0] for expert in run]
                found |= {expert: (place, position) for position, expert in enumerate(held)}
            self._owners[where] = [found[expert] for expert in range(experts)]
        return self._owners[where]


def alone(value: torch.Tensor, name: str) -> bool:
    """Say whether this rank has all of a tensor."""
    return not isinstance(value, DTensor) or not _cuts(placed(value, name))


def _cuts(where: Placed) -> bool:
    return any(placement is not None and where.mesh.size(dim) > 1 for dim, placement in enumerate(where.placements))


def _part(native: torch.Tensor, item: Item) -> torch.Tensor:
    """Return what becomes an item of native experts [..., C, R]: some of the last axis, which are rows in hf."""
    if item.part == WHOLE:
        return native
    start, end = item.part.rows(native.shape[-1])
    return native[..., start:end]
