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


def send(stream: WeightStream, connection: Connection) -> None:
    """Send one pass of a stream; return when the receiver has read all of it.

    The receiver reads one bucket while the next one is filled. A rank that gets no tensors only takes part in gathers.
    """
    sent = False
    for bucket in stream.buckets():
        _wait_for(bucket.buffer)  # the other process doesn't see this process' CUDA streams
        connection.send((bucket.shareable(), bucket.entries))
        if sent:
            connection.recv()  # the bucket before this one is read
        sent = True
    if sent:
        connection.recv()
    if stream.keeps:
        connection.send(None)


def receive(connection: Connection) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (hf name, view of the sender's memory), valid until the next is asked for."""
    while (received := connection.recv()) is not None:
        buffer, entries = received
        yield from unpack(buffer, entries)
        _wait_for(buffer)
        del received, buffer
        connection.send("done")


def _wait_for(buffer: torch.Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
