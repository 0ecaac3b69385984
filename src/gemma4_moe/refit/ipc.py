"""Send buckets to another process of this machine without copies.

The memory is shared by CUDA IPC handles, or on the CPU as shared memory.

`torch.multiprocessing`'s reductions make and open the handles; a `multiprocessing` connection uses them for every
tensor. As with any such connection, both ends must trust each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.multiprocessing  # registers the reductions that `Connection.send` uses

from gemma4_moe.refit.buckets import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from gemma4_moe.refit.stream import WeightStream

_DONE = "done"


def send(stream: WeightStream, connection: Connection) -> None:
    """Send one pass of a stream; return when the receiver has read all of it.

    The receiver reads one bucket while the next one is filled. A rank that gets no tensors only takes part in gathers.
    """
    unread = 0
    for bucket in stream.buckets():
        _wait_for(bucket.buffer)  # the other process doesn't see this process' CUDA streams
        connection.send((bucket.buffer, bucket.entries))
        unread += 1
        if unread == 2:
            connection.recv()
            unread -= 1
    for _ in range(unread):
        connection.recv()
    if stream.keeps:
        connection.send(None)


def receive(connection: Connection) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (hf name, tensor) of one pass, each valid until the next is asked for.

    The tensors are views of the sender's memory.
    """
    while (received := connection.recv()) is not None:
        buffer, entries = received
        yield from unpack(buffer, entries)
        _wait_for(buffer)
        del received, buffer
        connection.send(_DONE)


def _wait_for(buffer: torch.Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
