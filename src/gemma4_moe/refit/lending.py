"""Memory lent to a consumer, and used again once the consumer has dropped every view of it.

Each loan of a buffer is a tensor with a storage of its own on the same memory. That storage ends with its last view,
whoever holds it: so a loan needs no acknowledgement, and a consumer that defers its work, as an engine does that keeps
the arguments of a load until a module is complete, still reads its own bytes.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from gemma4_moe.errors import UsageError


class Loan:
    """Bytes of a buffer, lent until neither this object nor a view of `memory` is left.

    Attributes:
        memory: The bytes, a one-dimensional uint8 tensor. Its views keep the loan.
    """

    def __init__(self, buffer: _Buffer, nbytes: int) -> None:
        self.memory = from_dlpack(to_dlpack(buffer.base))[:nbytes]  # the capsule is made without a look at streams
        self._buffer = buffer

    def shareable(self) -> torch.Tensor:
        """Return the bytes as a view of the buffer itself, which another process can map.

        It does not keep the loan: hold this object until the other process has released the bytes. On the CPU the first
        call for a buffer copies it into shared memory, which all its later loans are made of.
        """
        base = self._buffer.base
        if not base.is_shared():  # type: ignore[no-untyped-call]  # a CUDA tensor always is
            # Moving the storage itself would pull the memory away under the loan.
            self._buffer.base = torch.empty_like(base).share_memory_().copy_(base)  # type: ignore[no-untyped-call]
        return self._buffer.base[: self.memory.numel()]

    def done_on(self, stream: torch.cuda.Stream) -> None:
        """Declare that no work put on `stream` after this call reads the bytes."""
        self._buffer.events.append(stream.record_event())
        self._buffer.base.record_stream(stream)


class _Buffer:
    """The memory of one loan after the other."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.base = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.events: list[Any] = []  # of streams on which the consumer of the loan has read it
        self.label = ""
        self._storage: StorageWeakRef | None = None  # of the loan

    def is_lent(self) -> bool:
        """Return whether anything still holds the last loan."""
        return self._storage is not None and not self._storage.expired()  # type: ignore[no-untyped-call]

    def lend(self, nbytes: int, label: str) -> Loan:
        """Return a loan of the first bytes, which no earlier one may have any more."""
        loan = Loan(self, nbytes)
        self.label = label
        self._storage = StorageWeakRef(loan.memory.untyped_storage())  # type: ignore[no-untyped-call]
        return loan


class Lender:
    """At most `limit` buffers on one device, made when they are needed.

    On a GPU a buffer is lent again only after all work that was then on the streams on which its consumer asked for
    the next loan, and after the events of `Loan.done_on`.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._buffers: list[_Buffer] = []
        self._asked_on: set[Any] = set()

    def lend(self, nbytes: int, label: str, at_least: int = 0) -> Loan:
        """Return `nbytes` of uninitialised memory in a buffer of `at_least` so many bytes.

        `label` names the contents in an error.

        Raises:
            UsageError: All buffers are still lent.
        """
        loan = self.lend_if_free(nbytes, label, at_least)
        if loan is None:
            gc.collect()  # views in a reference cycle
            loan = self.lend_if_free(nbytes, label, at_least)
        if loan is None:
            raise self._all_lent()
        return loan

    def lend_if_free(self, nbytes: int, label: str, at_least: int = 0) -> Loan | None:
        """Return what `lend` returns, or None if all buffers are still lent."""
        buffer = self._free(nbytes)
        if buffer is None:
            if len(self._buffers) == self._limit:
                self._drop_one_that_is_free()
            if len(self._buffers) == self._limit:
                return None
            buffer = _Buffer(max(nbytes, at_least), self._device)
            self._buffers.append(buffer)
        self._wait_for_readers(buffer)
        return buffer.lend(nbytes, label)

    def _free(self, nbytes: int) -> _Buffer | None:
        """Return the smallest buffer that is not lent and has room."""
        free = (buffer for buffer in self._buffers if buffer.base.numel() >= nbytes and not buffer.is_lent())
        return min(free, key=lambda buffer: buffer.base.numel(), default=None)

    def _drop_one_that_is_free(self) -> None:
        """Release a buffer that is not lent and has no room, if all may not grow in number."""
        free = next((buffer for buffer in self._buffers if not buffer.is_lent()), None)
        if free is not None:
            self._wait_for_readers(free)
            self._buffers.remove(free)

    def _wait_for_readers(self, buffer: _Buffer) -> None:
        if self._device.type != "cuda":
            return
        now = torch.cuda.current_stream(self._device)
        self._asked_on.add(now)
        for stream in self._asked_on - {now}:
            now.wait_stream(stream)
        for event in buffer.events:
            now.wait_event(event)
        buffer.events.clear()

    def _all_lent(self) -> UsageError:
        held = ", ".join(buffer.label for buffer in self._buffers)
        return UsageError(
            f"a consumer still holds all {self._limit} buffers",
            expected="one that neither it nor a view of it holds",
            found=f"held: {held}",
            hint=f"set buffers to more than {self._limit}, or drop tensors once they are read, or copy them",
        )
