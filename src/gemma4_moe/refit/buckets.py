"""Buckets: many tensors in one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.layout.names import layer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gemma4_moe.refit.items import Item
    from gemma4_moe.refit.lending import Loan

Oversize = Literal["error", "own"]

#: Offsets in a bucket are multiples of this many bytes: enough for every dtype and for vector loads on every device.
ALIGNMENT = 512


#: Tensors of at most so many bytes, such as norms and scales, are given to a consumer as copies by default.
SMALL_BYTES = 2**16


class BucketEntry(NamedTuple):
    """The place of one tensor in a bucket, as `json` can write it."""

    name: str  # in the hf layout
    shape: tuple[int, ...]
    dtype: str  # torch's name
    offset: int  # of the first byte from the start of the bucket
    nbytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that one kernel call writes: one item, or one part of consecutive experts.

    As one tensor they have a single item's shape, or [n, rows, columns] for n experts, at equal distances in a bucket.
    """

    items: tuple[Item, ...]
    entries: tuple[BucketEntry, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # in elements from the start of the bucket

    @classmethod
    def of(cls, items: Sequence[Item], entries: Sequence[BucketEntry]) -> Batch:
        """Return the batch of items of one shape at equal distances."""
        first, dtype = entries[0], getattr(torch, entries[0].dtype)
        shape, stride = first.shape, torch.empty(first.shape, device="meta").stride()
        if items[0].part.expert is not None:
            apart = entries[1].offset - first.offset if len(entries) > 1 else first.nbytes
            shape, stride = (len(items), *shape), (apart // dtype.itemsize, *stride)
        return cls(tuple(items), tuple(entries), dtype, shape, stride, first.offset // dtype.itemsize)


@dataclass(frozen=True, slots=True)
class PlannedBucket:
    """The plan of one bucket."""

    batches: tuple[
        Batch, ...
    ]  # of each mapping of the state the largest first: while a GPU works on it, the host launches the rest
    entries: tuple[BucketEntry, ...]
    size: int  # in bytes, a multiple of `ALIGNMENT`


class Bucket:
    """Tensors in one buffer, which is filled again once nothing holds this object or a view of the buffer.

    On a GPU the buffer is filled on the stream that is current when the consumer asks for the bucket. It is filled
    again only after all work that is then on the consumer's current stream. A consumer that reads on another stream
    lets that stream wait for the current one first, and calls `done_on` before it drops the bucket.

    Attributes:
        entries: The tensors and their places.
        buffer: The bytes, a one-dimensional uint8 tensor.
    """

    def __init__(self, loan: Loan, planned: PlannedBucket) -> None:
        self.entries = planned.entries
        self.buffer = loan.memory
        self._loan = loan
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def tensors(self, copy_up_to: int = SMALL_BYTES) -> list[tuple[str, torch.Tensor]]:
        """Return (name, tensor) for everything in the bucket, for a consumer that may keep some of them.

        Tensors are views of the buffer, but for those of at most `copy_up_to` bytes, which are copies: engines keep
        some of these until a pass ends, and would keep a whole buffer with each.
        """
        return copying(unpack(self.buffer, self.entries), copy_up_to)

    def view_of(self, batch: Batch) -> torch.Tensor:
        """Return a batch's place in the buffer as one tensor."""
        if batch.dtype not in self._typed:
            self._typed[batch.dtype] = self.buffer.view(batch.dtype)
        return self._typed[batch.dtype].as_strided(batch.shape, batch.stride, batch.start)

    def shareable(self) -> torch.Tensor:
        """Return the bytes for another process, as `Loan.shareable` does: hold the bucket until it has read them."""
        return self._loan.shareable()

    def done_on(self, stream: torch.cuda.Stream) -> None:
        """Declare that no work put on `stream` after this call reads the bucket."""
        self._loan.done_on(stream)


def plan_buckets(items: Iterable[Item], bucket_bytes: int, oversize: Oversize) -> list[PlannedBucket]:
    """Return buckets of the items in their order, each as full as `bucket_bytes` allows."""
    groups: list[list[Item]] = []
    used = 0
    for item in items:
        if item.nbytes > bucket_bytes and oversize == "error":
            raise UsageError(
                "a tensor that is larger than a bucket",
                tensor=item.name,
                expected=f"at most bucket_bytes = {bucket_bytes} bytes",
                found=f"{item.nbytes} bytes",
                hint=f'set bucket_bytes to {item.nbytes} or more, or oversize="own"'
                + ('; experts="per-expert" splits the experts' if len(item.shape) > 2 else ""),
            )
        if not groups or used + item.nbytes > bucket_bytes:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += aligned(item.nbytes)
    return [_planned(group) for group in groups]


def buffers_for(planned: Sequence[PlannedBucket]) -> int:
    """Return the buffers that serve a consumer which keeps a layer's tensors until it has all of them.

    Those are as many as the buckets of a layer, and one more for the next.
    """
    spans: dict[object, set[int]] = {}
    for number, bucket in enumerate(planned):
        for name in (item.role for batch in bucket.batches for item in batch.items):
            spans.setdefault(layer_of(name) or name, set()).add(number)
    return 1 + max((max(span) - min(span) + 1 for span in spans.values()), default=1)


def copying(views: Iterable[tuple[str, torch.Tensor]], up_to: int) -> list[tuple[str, torch.Tensor]]:
    """Return the same pairs, with copies in the place of tensors of at most so many bytes."""
    return [(name, view.clone() if view.nbytes <= up_to else view) for name, view in views]


def unpack(buffer: torch.Tensor, entries: Iterable[Sequence[Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return (hf name, tensor) for each entry of a bucket: views of `buffer`, no copies.

    The buffer may be on any device and in any process, and the entries may come from `json`.
    """
    return [
        (name, buffer[offset : offset + nbytes].view(getattr(torch, dtype)).view(tuple(shape)))
        for name, shape, dtype, offset, nbytes in entries
    ]


def _planned(group: Sequence[Item]) -> PlannedBucket:
    entries, offset = [], 0
    for item in group:
        entries.append(BucketEntry(item.name, item.shape, item.dtype.name, offset, item.nbytes))
        offset += aligned(item.nbytes)
    batches: list[list[tuple[Item, BucketEntry]]] = []
    last: dict[object, list[tuple[Item, BucketEntry]]] = {}
    for item, entry in zip(group, entries, strict=True):
        batch = last.get((item.origin.name, item.part.slot), [])
        if not _continues(batch, item, entry):
            batch = last[(item.origin.name, item.part.slot)] = []
            batches.append(batch)
        batch.append((item, entry))
    planned = [Batch.of(*zip(*batch, strict=True)) for batch in batches]
    planned.sort(key=lambda batch: (batch.items[0].origin.mapping, -sum(entry.nbytes for entry in batch.entries)))
    return PlannedBucket(tuple(planned), tuple(entries), offset)


def _continues(batch: Sequence[tuple[Item, BucketEntry]], item: Item, entry: BucketEntry) -> bool:
    """Return whether an item is the next expert of a batch, of its dtype and at the distance of those before it."""
    if not batch or item.part.expert is None:
        return False
    before, at = batch[-1]
    if before.part.expert is None or item.part.expert != before.part.expert + 1 or entry.dtype != at.dtype:
        return False
    return len(batch) == 1 or entry.offset - at.offset == at.offset - batch[-2][1].offset


def aligned(nbytes: int) -> int:
    """Return a size in bytes rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
