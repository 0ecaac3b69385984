"""Buckets: many tensors in one buffer. Two buffers take turns, so that one is read while the other is filled."""

from __future__ import annotations

import os
from collections import deque
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

    batches: tuple[Batch, ...]
    entries: tuple[BucketEntry, ...]
    size: int  # in bytes, a multiple of `ALIGNMENT`


class Bucket:
    """Tensors in one buffer, valid until the bucket after the next is asked for.

    On a GPU the buffer is filled on the stream that is current when the consumer asks for the bucket. It is filled
    again only after all work that was on the consumer's current stream when it asked for the next bucket. A consumer
    that reads on another stream lets that stream wait for the current one first, and then calls `done_on`.
    """

    def __init__(self, memory: torch.Tensor, planned: PlannedBucket) -> None:
        self.entries = planned.entries  # the tensors and their places
        self._size = planned.size
        self._memory: torch.Tensor | None = memory
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._events: list[Any] = []

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, a one-dimensional uint8 tensor; a UsageError once a later bucket has them."""
        if self._memory is None:
            raise UsageError(
                "a bucket that was kept too long",
                expected="use of a bucket before the one after the next is asked for",
                found="a buffer that holds a later bucket",
                hint="copy tensors that are needed later, or consume each bucket before asking for more",
            )
        return self._memory[: self._size]

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return (hf name, tensor) for everything in the bucket: views of the buffer, no copies."""
        return unpack(self.buffer, self.entries)

    def view_of(self, batch: Batch) -> torch.Tensor:
        """Return a batch's place in the buffer as one tensor."""
        if batch.dtype not in self._typed:
            self._typed[batch.dtype] = self.buffer.view(batch.dtype)
        return self._typed[batch.dtype].as_strided(batch.shape, batch.stride, batch.start)

    def done_on(self, stream: torch.cuda.Stream) -> None:
        """Declare that no work put on `stream` after this call reads the bucket."""
        self._events.append(stream.record_event())
        self.buffer.record_stream(stream)

    def _retire(self, stream: torch.cuda.Stream | None) -> torch.Tensor | None:
        """Return the memory, and let `stream` wait for the consumer's last reads."""
        memory, self._memory = self._memory, None
        self._typed.clear()
        if stream is not None:
            for event in self._events:
                stream.wait_event(event)
        return memory


class Buffers:
    """The two buffers of one pass, of `size` bytes, which take turns.

    A larger bucket gets a buffer of its own. With GEMMA4_MOE_DEBUG=1 no buffer is used twice: each is replaced by a new
    one, and it is an error if the consumer still holds the old one or a view of it.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._size = size
        self._lent: deque[Bucket] = deque()
        self._debug = os.environ.get("GEMMA4_MOE_DEBUG") == "1"

    def take(self, planned: PlannedBucket) -> Bucket:
        """Return an unfilled bucket in the buffer whose turn it is."""
        size, memory = max(self._size, planned.size), None
        if len(self._lent) == 2:
            bucket = self._lent.popleft()
            memory = bucket._retire(self._stream())
        if memory is not None and (self._debug or memory.numel() != size):
            storage = StorageWeakRef(memory.untyped_storage())  # type: ignore[no-untyped-call]
            memory = None
            if self._debug and not storage.expired():  # type: ignore[no-untyped-call]
                raise UsageError(
                    "a consumer still holds a bucket, or a view of it, whose buffer must be filled again",
                    found=f"the bucket that starts with {bucket.entries[0].name}",
                    hint="copy tensors that are needed later; drop the bucket and its tensors before asking for more",
                )
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._lent.append(Bucket(memory, planned))
        return self._lent[-1]

    def asked_for_next(self, bucket: Bucket) -> None:
        """Record the position of the consumer's stream as it asks for the bucket after `bucket`."""
        stream = self._stream()
        if stream is not None:
            bucket._events.append(stream.record_event())

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


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
    batches: dict[object, list[tuple[Item, BucketEntry]]] = {}
    for item, entry in zip(group, entries, strict=True):
        key = item.name if item.part.expert is None else (item.origin.name, item.part.slot)
        batches.setdefault(key, []).append((item, entry))
    return PlannedBucket(
        tuple(Batch.of(*zip(*batch, strict=True)) for batch in batches.values()), tuple(entries), offset
    )


def aligned(nbytes: int) -> int:
    """Return a size in bytes rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
