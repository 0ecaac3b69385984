"""Buckets: many tensors side by side in one buffer, at most two buffers alive, filled while the other one is read."""

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
    """Where one tensor lies in a bucket, as `json` can write it.

    Attributes:
        name: Its hf name.
        shape: Its shape.
        dtype: torch's name of its dtype.
        offset: Its first byte.
        nbytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """One item; or the same part of consecutive experts of one tensor, which lie at equal distances in a bucket.

    Attributes:
        items: The items.
        entries: Where they lie.
        dtype: Their dtype.
        shape: What they are as one tensor: an item's own shape, or [n, rows, columns] for n experts.
        stride: Its strides in elements.
        start: Its first element, counted from the start of the buffer.
    """

    items: tuple[Item, ...]
    entries: tuple[BucketEntry, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, items: Sequence[Item], entries: Sequence[BucketEntry]) -> Run:
        """Say how items of one shape, at equal distances, lie in a buffer."""
        first, dtype = entries[0], getattr(torch, entries[0].dtype)
        shape, stride = first.shape, torch.empty(first.shape, device="meta").stride()
        if items[0].part.expert is not None:
            apart = entries[1].offset - first.offset if len(entries) > 1 else first.nbytes
            shape, stride = (len(items), *shape), (apart // dtype.itemsize, *stride)
        return cls(tuple(items), tuple(entries), dtype, shape, stride, first.offset // dtype.itemsize)


@dataclass(frozen=True, slots=True)
class PlannedBucket:
    """What one bucket will hold.

    Attributes:
        runs: Its tensors, grouped by what can be written at once.
        entries: All of them in order.
        size: Its size in bytes, a multiple of `ALIGNMENT`.
        ordinary: Whether it is no larger than asked for.
    """

    runs: tuple[Run, ...]
    entries: tuple[BucketEntry, ...]
    size: int
    ordinary: bool


class Bucket:
    """Tensors side by side in one buffer, lent to the consumer until it asks for the bucket after the next.

    On a GPU the buffer is filled on the stream that is current when the bucket is asked for, and is filled again only
    after everything that the consumer had put on its current stream when it asked for the next one. A consumer that
    reads on another stream lets that stream wait for the current one first, and says when it is done by `done_on`.

    Attributes:
        entries: What lies where.
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
                found="its buffer holds another bucket by now",
                hint="copy what is needed later, or consume each bucket before asking for more",
            )
        return self._buffer

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return (hf name, tensor) for everything in the bucket: views of the buffer, no copies."""
        return unpack(self.buffer, self.entries)

    def place_of(self, run: Run) -> torch.Tensor:
        """Return a run's place in the buffer, as one tensor; a bucket holds dozens, so this is one view each."""
        typed = self._typed.get(run.dtype)
        if typed is None:
            typed = self._typed[run.dtype] = self.buffer.view(run.dtype)
        return typed.as_strided(run.shape, run.stride, run.start)

    def done_on(self, stream: torch.cuda.Stream) -> None:
        """Say that what `stream` has been given by now is the last that reads this bucket there."""
        self._events.append(stream.record_event())
        self.buffer.record_stream(stream)

    def _retire(self, stream: torch.cuda.Stream | None) -> None:
        """Take the buffer back; what is put on `stream` from now on comes after the consumer's last reads."""
        self._buffer = None
        self._typed.clear()
        if stream is not None:
            for event in self._events:
                stream.wait_event(event)


class Buffers:
    """The two buffers of one pass, by turns.

    With GEMMA4_MOE_DEBUG=1 no buffer is used twice: each is given up for a new one, and a consumer that still holds
    the old one, or a view of it, is told so.

    Args:
        device: Where they are.
        size: Size in bytes of a buffer for ordinary buckets.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._size = size
        self._lent: list[Bucket | None] = [None, None]
        self._memory: list[torch.Tensor | None] = [None, None]
        self._turn = 0
        self._debug = os.environ.get("GEMMA4_MOE_DEBUG") == "1"

    def take(self, planned: PlannedBucket) -> Bucket:
        """Return a bucket to be filled, in the buffer whose turn it is.

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
        """Take note of how far the consumer's stream is as it asks for the bucket after `bucket`."""
        stream = self._stream()
        if stream is not None:
            bucket._events.append(stream.record_event())

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def plan_buckets(items: Iterable[Item], bucket_bytes: int, oversize: Oversize) -> list[PlannedBucket]:
    """Spread items over buckets in their order, each as full as `bucket_bytes` allows.

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
        used += _aligned(item.nbytes)
    return [_planned(group, bucket_bytes) for group in groups]


def unpack(buffer: torch.Tensor, entries: Iterable[Sequence[Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return (hf name, tensor) for each entry: views of `buffer`, no copies.

    Args:
        buffer: A bucket's bytes, uint8, on any device and in any process.
        entries: The bucket's entries, or what `json` has made of them.
    """
    found = []
    for name, shape, dtype, offset, nbytes in entries:
        found.append((name, buffer[offset : offset + nbytes].view(getattr(torch, dtype)).view(tuple(shape))))
    return found


def _still_held(bucket: Bucket) -> UsageError:
    return UsageError(
        "a consumer still holds a bucket, or a view of it, whose buffer is to be filled again",
        found=f"the bucket that starts with {bucket.entries[0].name}",
        hint="copy what is needed later; drop the bucket and its tensors before asking for more",
    )


def _planned(group: Sequence[Item], bucket_bytes: int) -> PlannedBucket:
    entries, offset = [], 0
    for item in group:
        entries.append(BucketEntry(*item.planned[:3], offset, item.nbytes))
        offset += _aligned(item.nbytes)
    runs: dict[object, list[tuple[Item, BucketEntry]]] = {}
    for item, entry in zip(group, entries, strict=True):
        runs.setdefault(item.name if item.part.expert is None else (item.native, item.part.slot), []).append(
            (item, entry)
        )
    return PlannedBucket(
        tuple(Run.of(*zip(*run, strict=True)) for run in runs.values()),
        tuple(entries),
        offset,
        ordinary=group[0].nbytes <= bucket_bytes,
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
