"""Write the tensors of a stream into given memory: converted, cast and gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.gathering import Gatherer
from gemma4_moe.distributed.packing import copy, copy_all
from gemma4_moe.distributed.placements import Placed, local_of, placed
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import Operation, converted_shape, transposes

if TYPE_CHECKING:
    import torch

    from gemma4_moe.refit.buckets import Batch, Bucket
    from gemma4_moe.refit.items import Item
    from gemma4_moe.refit.lora import Merger


class Filler:
    """Fills the tensors of one pass, or only takes part in collectives. They are complete after `flush`."""

    def __init__(self, kernel: str, *, keeps: bool, merger: Merger | None = None) -> None:
        self._kernel = kernel
        self._merger = merger
        self._keeps = keeps
        self._gatherer = Gatherer()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(self, item: Item, value: torch.Tensor, out: torch.Tensor) -> None:
        """Write one item, made from `value`, into `out`. All ranks of a DTensor's mesh must call."""
        expert = item.part.expert
        if expert is None:
            self._fill(item, value, out, None)
        else:
            self._fill(item, value, out[None], (expert, expert + 1))

    def fill_batch(self, batch: Batch, value: torch.Tensor, bucket: Bucket) -> None:
        """Write a batch of items, made from `value`, to their places in a bucket."""
        first, last = batch.items[0].part.expert, batch.items[-1].part.expert
        if first is None or last is None:
            self.fill(batch.items[0], value, bucket.view_of(batch))
        else:
            self._fill(batch.items[0], value, bucket.view_of(batch), (first, last + 1))

    def flush(self) -> None:
        """Complete what was filled, for work that is put on the current stream after this call."""
        self._gatherer.finish()
        copy_all(self._copies)
        self._copies = []

    def _fill(self, item: Item, value: torch.Tensor, out: torch.Tensor, experts: tuple[int, int] | None) -> None:
        """Write a whole tensor, or a part of each of some experts, into `out`."""
        if self._merger is not None:
            value = self._merger.merged(item, value)
        local = local_of(value)
        where = placed(value, item.origin.name) if isinstance(value, DTensor) else None
        if item.operation is Operation.FOLD:
            out.fill_(1)
        elif where is not None and where.is_cut:
            self._gather(item, tuple(value.shape), local, where, out, experts)
        elif self._keeps and item.operation is Operation.KEEP and item.part == WHOLE and local.dtype == out.dtype:
            self._copies.append((out, local))
        elif self._keeps:
            self._convert(item, _part(local if experts is None else local[slice(*experts)], item), out)

    def _convert(self, item: Item, native: torch.Tensor, out: torch.Tensor) -> None:
        """Write native values into `out` in hf layout."""
        if item.operation is not Operation.KEEP:
            transpose_scale_cast(native, out=out, kernel=self._kernel)
        elif native.dtype == out.dtype:
            out.copy_(native)
        else:
            one = native.ndim == 0  # the kernels take at least one axis
            scale_cast(native[None] if one else native, out=out[None] if one else out, kernel=self._kernel)

    def _gather(
        self,
        item: Item,
        shape: tuple[int, ...],
        local: torch.Tensor,
        where: Placed,
        out: torch.Tensor,
        experts: tuple[int, int] | None,
    ) -> None:
        """Gather an item of a native tensor of `shape`, of which this rank has `local`."""
        window = None if experts is None else (experts[0], shape[0])
        moved = where.converted(item.operation, len(shape))
        if item.part.slots > 1 and any(p and p.axis == 1 for p in moved.placements):
            # Gate and up are on different ranks: the experts are gathered whole.
            whole = converted_shape(item.operation, shape)[1:]
            both = out.new_empty((len(out), *whole))
            self._gatherer.add(local, where, both, lambda x, y: self._convert(item, x, y), item.operation, window)
            self._gatherer.finish()
            start, end = item.part.rows(whole[0])
            out.copy_(both[:, start:end])
        elif item.operation is Operation.KEEP and item.part == WHOLE and local.dtype == out.dtype:
            self._gatherer.add(local, where, out, copy, item.operation, window)
        else:
            convert = lambda x, y: self._convert(item, _part(x, item), y)  # noqa: E731
            self._gatherer.add(local, where, out, convert, item.operation, window)


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
