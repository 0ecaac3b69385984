"""Send buckets to another process of this machine without copies.

The memory is shared by CUDA IPC handles, or on the CPU as shared memory. `torch.multiprocessing`'s reductions make and
open the handles; a `multiprocessing` connection uses them for every tensor. As with any such connection, both ends must
trust each other. Each process closes the other's end of the connection, or nobody notices that the other died.

The receiver opens a pass with a token of its own, and asks for each bucket, so that a sender never writes to a process
that doesn't read. Every message carries the token; each side drops the messages of other passes. So after an error the
next `send` and `receive` work on the same connection, as long as both processes live.
"""

from __future__ import annotations

import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.multiprocessing  # registers the reductions that `Connection.send` uses
from torch.multiprocessing.reductions import StorageWeakRef

from gemma4_moe.refit import endings
from gemma4_moe.refit.buckets import SMALL_BYTES, copying, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from gemma4_moe.refit.buckets import Bucket
    from gemma4_moe.refit.stream import WeightStream


class _Message(NamedTuple):
    token: str  # of the pass
    kind: str  # of the receiver: open, next, released, done; of the sender: bucket, end; of both: failed
    content: Any = None


def send(stream: WeightStream, connection: Connection, *, timeout: float = endings.TIMEOUT_SECONDS) -> None:
    """Send one pass of a stream; return when the receiver's `with` block has ended.

    The receiver reads a bucket while the next one is filled. The memory of a bucket is filled again once the receiver
    has dropped all its tensors. A rank that gets no tensors only takes part in gathers.

    Args:
        stream: The stream.
        connection: One end; the receiver has the other.
        timeout: The most seconds that the receiver takes to come, to read a bucket, or to end its block.

    Raises:
        ParallelError: The receiver failed, died, abandoned the pass, or took longer than `timeout`.
        UsageError: The receiver holds buckets in all `buffers` of the stream and asks for more.
    """
    if not stream.keeps:
        for _ in stream.buckets():
            pass
        return
    receiver = _Receiver(connection, timeout)
    buckets = stream.buckets()
    try:
        receiver.wait_until_open()
        _send_all(buckets, receiver, stream.buffers()[0])
    except BaseException as error:
        receiver.tell("failed", endings.text_of(error))
        raise
    finally:
        receiver.held.clear()
        buckets.close()  # type: ignore[attr-defined]  # the other trainer ranks learn of it


def _send_all(buckets: Iterator[Bucket], receiver: _Receiver, most: int) -> None:
    number = 0
    while True:
        if len(receiver.held) >= most:
            receiver.wait_until_asked()  # a consumer that still holds them all is refused by the stream
        bucket = next(buckets, None)
        receiver.wait_until_asked()
        if bucket is None:
            break
        receiver.give(number, bucket)
        del bucket
        number += 1
    receiver.tell("end")
    receiver.wait_for("done", "end its `with` block")


class _Receiver:
    """The sender's view of the receiver: whether it has asked, and the buckets that it holds."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self.held: dict[int, Bucket] = {}
        self._connection = connection
        self._timeout = timeout
        self._token = ""
        self._asked = False
        self._last: str | None = None  # the first tensor of the last bucket

    def wait_until_open(self) -> None:
        """Wait for a pass that the receiver opens; one that ended before this call is dropped."""
        while self._connection.poll():
            message = self._next("call `receive`")
            if message.kind == "open":
                self._token, self._asked = message.token, False
            elif message.token == self._token:
                self._token = "" if message.kind == "failed" else self._token
                self._asked = message.kind == "next"
        while not self._token:
            message = self._next("call `receive`")
            if message.kind == "open":
                self._token = message.token

    def wait_until_asked(self) -> None:
        """Wait until the consumer asks for the next bucket."""
        if not self._asked:
            self.wait_for("next", "read it")
            self._asked = True

    def give(self, number: int, bucket: Bucket) -> None:
        """Send a bucket, and hold it until it is released."""
        self.held[number] = bucket
        self._last, self._asked = bucket.entries[0].name, False
        buffer = bucket.shareable()
        _wait_for(buffer)  # the other process doesn't see this process' CUDA streams
        self.tell("bucket", (number, buffer, bucket.entries))

    def wait_for(self, kind: str, action: str) -> None:
        """Wait for a message of the pass, and take back the buckets that are released meanwhile."""
        while True:
            message = self._next(action)
            if message.kind == "failed":
                raise endings.told("the receiver", message.content, self._last)
            for number in message.content or ():
                self.held.pop(number)
            if message.kind == kind:
                return

    def tell(self, kind: str, content: Any = None) -> None:
        """Send a message, unless the receiver is gone: the next wait says so."""
        with suppress(OSError):
            self._connection.send(_Message(self._token, kind, content))

    def _next(self, action: str) -> _Message:
        return _received(self._connection, self._timeout, "the receiver", action, self._last)


@contextmanager
def receive(
    connection: Connection, *, copy_up_to: int = SMALL_BYTES, timeout: float = endings.TIMEOUT_SECONDS
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Open a pass, and give its (hf name, tensor) pairs to a `with` block.

    `with receive(connection) as tensors: engine.load_weights(tensors)`.

    Each tensor is a view of the sender's memory, which stays as it is until all tensors of its bucket are dropped: a
    consumer may keep tensors, within the stream's `buffers`. An error in the block ends the pass on both sides, in the
    sender with its text. A block that ends before the last tensor abandons the pass.

    Args:
        connection: One end; the sender has the other.
        copy_up_to: Tensors of at most so many bytes are copies; see `Bucket.tensors`.
        timeout: The most seconds that the sender takes to come, or to fill a bucket.

    Raises:
        ParallelError: The sender failed, died, or took longer than `timeout`.
    """
    sender = _Sender(connection, copy_up_to, timeout)
    try:
        sender.tell("open")
        yield sender.tensors()
    except BaseException as error:
        sender.tell("failed", endings.text_of(error))
        raise
    sender.finish()


class _Sender:
    """The receiver's view of the sender, and of the buckets that it has lent."""

    def __init__(self, connection: Connection, copy_up_to: int, timeout: float) -> None:
        self._connection = connection
        self._copy_up_to = copy_up_to
        self._timeout = timeout
        self._token = uuid.uuid4().hex
        self._lent: dict[int, StorageWeakRef] = {}
        self._device = torch.device("cpu")
        self._last: str | None = None  # the first tensor of the last bucket
        self._ended = False

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the pass, and say which buckets are released."""
        while True:
            self.tell("next", self._released())
            message = self._of_this_pass()
            if message.kind == "end":
                self._ended = True
                return
            number, buffer, entries = message.content
            self._device, self._last = buffer.device, entries[0].name
            self._lent[number] = StorageWeakRef(buffer.untyped_storage())  # type: ignore[no-untyped-call]
            views = copying(reversed(unpack(buffer, entries)), self._copy_up_to)
            del message, buffer
            while views:
                yield views.pop()
                if len(self._lent) > 1 and (released := self._released()):
                    self.tell("released", released)  # early, so that the sender can fill them again

    def finish(self) -> None:
        """Tell the sender how the consumer's block ended."""
        if not self._ended:
            self.tell("failed", endings.ABANDONED)
            return
        self.tell("done", self._released())
        with suppress(OSError):  # a sender that died has sent everything
            if self._connection.poll():
                self._of_this_pass()

    def tell(self, kind: str, content: Any = None) -> None:
        """Send a message, unless the sender is gone: the next wait says so."""
        with suppress(OSError):
            self._connection.send(_Message(self._token, kind, content))

    def _of_this_pass(self) -> _Message:
        while True:
            message = _received(self._connection, self._timeout, "the sender", "send the next bucket", self._last)
            if message.token == self._token:
                break
        if message.kind == "failed":
            raise endings.told("the sender", message.content, self._last)
        return message

    def _released(self) -> list[int]:
        released = [number for number, storage in self._lent.items() if storage.expired()]  # type: ignore[no-untyped-call]
        for number in released:
            del self._lent[number]
        if released and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # reads that are still queued
        return released


def _received(connection: Connection, timeout: float, other: str, action: str, bucket: str | None) -> _Message:
    """Return the next message, of any pass."""
    try:
        if not connection.poll(timeout):
            raise endings.waited(other, action, bucket, timeout)
        message: _Message = connection.recv()
    except (OSError, EOFError) as error:
        raise endings.lost(other, bucket) from error
    return message


def _wait_for(buffer: torch.Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
