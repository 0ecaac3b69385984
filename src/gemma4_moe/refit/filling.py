"""Write one tensor of a stream into given memory: converted, cast and gathered."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.collectives import broadcast, gather
from gemma4_moe.distributed.placements import Placed, local_of, placed
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import Operation, converted_shape, transposes
from gemma4_moe.refit.buckets import unpack

if TYPE_CHECKING:
    from gemma4_moe.refit.buckets import Batch, Bucket
    from gemma4_moe.refit.items import Item

#: From this size in bytes on, a copy is faster alone than in a launch with others, which reaches 3/4 of the memory's
#: speed on an H100.
_OWN_LAUNCH_BYTES = 4 << 20


class Filler:
    """Fills the tensors of one pass, or only takes part in collectives."""

    def __init__(self, kernel: str, *, keeps: bool) -> None:
        self._kernel = kernel
        self._keeps = keeps
        self._owners: dict[Placed, list[tuple[tuple[int, ...], int]]] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(self, item: Item, value: torch.Tensor, out: torch.Tensor) -> None:
        """Write one item, made from `value`, into `out`, which is contiguous.

        A small copy without conversion waits for `flush`. All ranks of a DTensor's mesh must call.
        """
        local = local_of(value)
        if item.operation is Operation.FOLD:
            self._convert(item, local, out)
            return
        where = placed(value, item.origin.name) if isinstance(value, DTensor) else None
        if where is None or not where.is_cut:
            whole = item.operation is Operation.KEEP and item.part == WHOLE and local.dtype == out.dtype
            small = whole and item.nbytes < _OWN_LAUNCH_BYTES
            if self._keeps and small:
                self._copies.append((out, local))
            elif self._keeps:
                self._convert(item, _part(local if item.part.expert is None else local[item.part.expert], item), out)
        elif item.part.expert is None:
            self._fill_rows(item, tuple(value.shape), local, where, out)
        else:
            self._fill_expert(item, item.part.expert, tuple(value.shape), local, where, out)

    def fill_batch(self, batch: Batch, value: torch.Tensor, bucket: Bucket) -> None:
        """Write a batch of items, made from `value`, to their places in a bucket."""
        items = batch.items
        if items[0].part.expert is None:
            self.fill(items[0], value, bucket.view_of(batch))
        elif not holds_all(value, items[0].origin.name):
            for item, (_, out) in zip(items, unpack(bucket.buffer, batch.entries), strict=True):
                self.fill(item, value, out)
        elif self._keeps:
            first, last = items[0].part.expert, items[-1].part.expert
            assert first is not None and last is not None, "a batch of experts"  # noqa: PT018
            self._convert(items[0], _part(local_of(value)[first : last + 1], items[0]), bucket.view_of(batch))

    def flush(self) -> None:
        """Make all small copies that wait, in one launch."""
        if self._copies:
            outs, sources = zip(*self._copies, strict=True)
            torch._foreach_copy_(outs, sources)
            self._copies = []

    def _convert(self, item: Item, native: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write native values into `out` in hf layout, and return it; FOLD gives ones."""
        if item.operation is Operation.FOLD:
            return out.fill_(1)
        if item.operation is not Operation.KEEP:
            transpose_scale_cast(native, out=out, kernel=self._kernel)
        elif native.dtype == out.dtype:
            out.copy_(native)
        else:
            one = native.ndim == 0  # the kernels take at least one axis
            scale_cast(native[None] if one else native, out=out[None] if one else out, kernel=self._kernel)
        return out

    def _fill_expert(
        self, item: Item, expert: int, shape: tuple[int, ...], local: torch.Tensor, where: Placed, out: torch.Tensor
    ) -> None:
        """Write one expert's part on the owner ranks, and broadcast it to the others."""
        owner, position = self._owners_of(where, shape[0])[expert]
        if all(where.coordinate[dim] == owner[dim] for dim in where.expert_dims):
            along = Placed(where.mesh, tuple(p if p and p.axis != 0 else None for p in where.placements))
            self._fill_rows(item, (1, *shape[1:]), local[position : position + 1], along, out[None])
        broadcast(out, where, owner)

    def _fill_rows(
        self, item: Item, shape: tuple[int, ...], local: torch.Tensor, where: Placed, out: torch.Tensor
    ) -> None:
        """Write all, or a run of rows of each expert, of a native tensor of which each rank has `local`."""
        moved = where.converted(item.operation, len(shape))
        if not where.is_cut:
            self._convert(item, _part(local, item), out)
        elif item.part.slots > 1 and any(p and p.axis == 1 for p in moved.placements):
            # Gate and up are on different ranks: the experts are gathered whole.
            whole = converted_shape(item.operation, shape)
            start, end = item.part.rows(whole[1])
            shard = self._convert(item, local, out.new_empty(moved.local_shape(whole)))
            out.copy_(gather(shard, moved, whole)[:, start:end])
        else:
            shard = self._convert(item, _part(local, item), out.new_empty(moved.local_shape(out.shape)))
            gather(shard, moved, out.shape, out=out)

    def _owners_of(self, where: Placed, experts: int) -> list[tuple[tuple[int, ...], int]]:
        """Return, for each expert, its owner's coordinate in the mesh and its position on that rank."""
        if where not in self._owners:
            found: dict[int, tuple[tuple[int, ...], int]] = {}
            cut = where.expert_dims
            for owner in product(*(range(where.mesh.size(d)) if d in cut else (0,) for d in range(where.mesh.ndim))):
                held = [expert for run in where.runs((experts,), owner)[0] for expert in run]
                found |= {expert: (owner, position) for position, expert in enumerate(held)}
            self._owners[where] = [found[expert] for expert in range(experts)]
        return self._owners[where]


def holds_all(value: torch.Tensor, name: str) -> bool:
    """Return whether this rank holds all of a tensor."""
    return not isinstance(value, DTensor) or not placed(value, name).is_cut


def _part(native: torch.Tensor, item: Item) -> torch.Tensor:
    """Return the values of experts [..., rows, columns] that become the item: a run of its rows in the hf layout."""
    if item.part == WHOLE:
        return native
    axis = native.ndim - (1 if transposes(item.operation) else 2)
    start, end = item.part.rows(native.shape[axis])
    return native.narrow(axis, start, end - start)
