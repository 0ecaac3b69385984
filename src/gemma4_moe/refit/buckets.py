"""Buckets: many tensors in one buffer. Two buffers take turns, so that one is read while the other is filled."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gemma4_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gemma4_moe.refit.items import Item

Oversize = Literal["error", "own"]

#: Offsets in a bucket are multiples of this many bytes: enough for every dtype and for vector loads on every device.
ALIGNMENT = 512


class BucketEntry(NamedTuple):
    """The place of one tensor in a bucket, as `json` can write it.

    Attributes:
        name: Its hf name.
        shape: Its shape.
        dtype: torch's name of its dtype.
        offset: Its first byte, counted from the start of the bucket.
        nbytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that one kernel call writes: one item, or one part of consecutive experts.

    Attributes:
        items: The items. Those of several experts are at equal distances in a bucket.
        entries: Their places.
        dtype: Their dtype.
        shape: Their shape as one tensor: a single item's own, or [n, rows, columns] for n experts.
        stride: The strides of that tensor in elements.
        start: Its first element, counted from the start of the bucket.
    """

    items: tuple[Item, ...]
    entries: tuple[BucketEntry, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

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
    """The plan of one bucket.

    Attributes:
        batches: Its items, grouped by the kernel call that writes them.
        entries: The places of all items, in order.
        size: Its size in bytes, a multiple of `ALIGNMENT`.
    """

    batches: tuple[Batch, ...]
    entries: tuple[BucketEntry, ...]
    size: int


class Bucket:
    """Tensors in one buffer, valid until the bucket after the next is asked for.

    On a GPU the buffer is filled on the stream that is current when the consumer asks for the bucket. It is filled
    again only after all work that was on the consumer's current stream when it asked for the next bucket. A consumer
    that reads on another stream lets that stream wait for the current one first, and then calls `done_on`.

    Attributes:
        entries: The tensors and their places.
    """

    def __init__(self, buffer: torch.Tensor, entries: Sequence[BucketEntry]) -> None:
        self.entries = tuple(entries)
        self._buffer: torch.Tensor | None = buffer
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._events: list[Any] = []

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, a one-dimensional uint8 tensor.

        Raises:
            UsageError: The buffer has been given to a later bucket.
        """
        if self._buffer is None:
            raise UsageError(
                "a bucket that was kept too long",
                expected="use of a bucket before the one after the next is asked for",
                found="a buffer that holds a later bucket",
                hint="copy tensors that are needed later, or consume each bucket before asking for more",
            )
        return self._buffer

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return (hf name, tensor) for everything in the bucket: views of the buffer, no copies."""
        return unpack(self.buffer, self.entries)

    def view_of(self, batch: Batch) -> torch.Tensor:
        """Return a batch's place in the buffer as one tensor."""
        typed = self._typed.get(batch.dtype)
        if typed is None:
            typed = self._typed[batch.dtype] = self.buffer.view(batch.dtype)
        return typed.as_strided(batch.shape, batch.stride, batch.start)

    def done_on(self, stream: torch.cuda.Stream) -> None:
        """Declare that no work put on `stream` after this call reads the bucket."""
        self._events.append(stream.record_event())
        self.buffer.record_stream(stream)

    def _retire(self, stream: torch.cuda.Stream | None) -> None:
        """Take the buffer back, and let `stream` wait for the consumer's last reads."""
        self._buffer = None
        self._typed.clear()
        if stream is not None:
            for event in self._events:
                stream.wait_event(event)


class Buffers:
    """The two buffers of one pass, which take turns.

    With GEMMA4_MOE_DEBUG=1 no buffer is used twice: each is replaced by a new one, and it is an error if the consumer
    still holds the old one or a view of it.

    Args:
        device: The buffers' device.
        size: Size in bytes of a buffer; a larger bucket gets a buffer of its own.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._size = size
        self._lent: list[Bucket | None] = [None, None]
        self._memory: list[torch.Tensor | None] = [None, None]
        self._turn = 0
        self._debug = os.environ.get("GEMMA4_MOE_DEBUG") == "1"

    def take(self, planned: PlannedBucket) -> Bucket:
        """Return an unfilled bucket in the buffer whose turn it is.

        Raises:
            UsageError: In debug mode, the consumer still holds that buffer.
        """
        turn, self._turn = self._turn, 1 - self._turn
        bucket, memory = self._lent[turn], self._memory[turn]
        if bucket is not None:
            bucket._retire(self._stream())
        size = max(self._size, planned.size)
        if memory is not None and (self._debug or memory.numel() != size):
            storage = StorageWeakRef(memory.untyped_storage())  # type: ignore[no-untyped-call]
            self._memory[turn] = memory = None
            if self._debug and bucket is not None and not storage.expired():  # type: ignore[no-untyped-call]
                raise _still_held(bucket)
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._memory[turn] = memory
        self._lent[turn] = lent = Bucket(memory[: planned.size], planned.entries)
        return lent

    def asked_for_next(self, bucket: Bucket) -> None:
        """Record the position of the consumer's stream as it asks for the bucket after `bucket`."""
        stream = self._stream()
        if stream is not None:
            bucket._events.append(stream.record_event())

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def plan_buckets(items: Iterable[Item], bucket_bytes: int, oversize: Oversize) -> list[PlannedBucket]:
    """Return buckets of the items in their order, each as full as `bucket_bytes` allows.

    Raises:
        UsageError: An item is larger than a bucket and `oversize` is "error".
    """
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


def unpack(buffer: torch.Tensor, entries: Iterable[Sequence[Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return (hf name, tensor) for each entry: views of `buffer`, no copies.

    Args:
        buffer: A bucket's bytes, uint8, on any device and in any process.
        entries: The bucket's entries, also after a round trip through `json`.
    """
    found = []
    for name, shape, dtype, offset, nbytes in entries:
        found.append((name, buffer[offset : offset + nbytes].view(getattr(torch, dtype)).view(tuple(shape))))
    return found


def _still_held(bucket: Bucket) -> UsageError:
    return UsageError(
        "a consumer still holds a bucket, or a view of it, whose buffer must be filled again",
        found=f"the bucket that starts with {bucket.entries[0].name}",
        hint="copy tensors that are needed later; drop the bucket and its tensors before asking for more",
    )


def _planned(group: Sequence[Item]) -> PlannedBucket:
    entries, offset = [], 0
    for item in group:
        entries.append(BucketEntry(*item.planned[:3], offset, item.nbytes))
        offset += aligned(item.nbytes)
    batches: dict[object, list[tuple[Item, BucketEntry]]] = {}
    for item, entry in zip(group, entries, strict=True):
        key = item.name if item.part.expert is None else (item.native, item.part.slot)
        batches.setdefault(key, []).append((item, entry))
    return PlannedBucket(
        tuple(Batch.of(*zip(*batch, strict=True)) for batch in batches.values()),
        tuple(entries),
        offset,
    )


def aligned(nbytes: int) -> int:
    """Return a size in bytes rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
