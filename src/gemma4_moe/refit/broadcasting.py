"""Send buckets to the ranks of a receiver group by `torch.distributed` broadcasts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.refit.buckets import aligned, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.refit.stream import WeightStream


def send(stream: WeightStream, group: dist.ProcessGroup | None = None) -> None:
    """Broadcast one pass of a stream to the ranks of a group that call `receive`.

    The default is the group of all ranks. A trainer rank that gets no tensors only takes part in the gathers, and need
    not be in the group.
    """
    for bucket in stream.buckets():
        _broadcast_entries(bucket.entries, dist.get_rank(), group, bucket.buffer.device)
        dist.broadcast(bucket.buffer, src=dist.get_rank(), group=group)
    if stream.keeps:
        _broadcast_entries(None, dist.get_rank(), group, None)


def receive(
    src: int, *, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (hf name, tensor) of one pass, each valid until the next is asked for.

    The sender's rank is `src`. The buffer is on `device`, which the group's backend must serve.
    """
    buffer = torch.empty(0, dtype=torch.uint8, device=device)
    while (entries := _broadcast_entries(None, src, group, torch.device(device))) is not None:
        size = entries[-1].offset + aligned(entries[-1].nbytes)
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        dist.broadcast(buffer[:size], src=src, group=group)
        yield from unpack(buffer, entries)


def _broadcast_entries(entries: Any, src: int, group: dist.ProcessGroup | None, device: torch.device | None) -> Any:
    """Return the entries of the next bucket of `src`, None at the end."""
    message = [entries]
    dist.broadcast_object_list(message, src=src, group=group, device=device)
    return message[0]
