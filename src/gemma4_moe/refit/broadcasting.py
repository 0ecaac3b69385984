"""Buckets to the ranks of a receiver group, by `torch.distributed` broadcasts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.refit.buckets import ALIGNMENT, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.refit.stream import WeightStream


def send(stream: WeightStream, group: dist.ProcessGroup | None = None) -> None:
    """Broadcast one pass of a stream to the other ranks of a group, all of which must call `receive`.

    Args:
        stream: The weights. Trainer ranks that it gives nothing only take part in what the trainer gathers, and need
            not be in the group.
        group: This rank and the receivers; all ranks by default.
    """
    for bucket in stream.buckets():
        _tell(bucket.entries, dist.get_rank(), group, bucket.buffer.device)
        dist.broadcast(bucket.buffer, src=dist.get_rank(), group=group)
    if stream.keeps:
        _tell(None, dist.get_rank(), group, None)


def receive(
    src: int, *, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (hf name, tensor) of one pass: views of one buffer, good until the next one is asked for.

    Args:
        src: The sender's rank.
        group: The sender and the receivers; all ranks by default.
        device: Where the buffer is: a device of the group's backend.
    """
    buffer = torch.empty(0, dtype=torch.uint8, device=device)
    while (entries := _tell(None, src, group, torch.device(device))) is not None:
        last = entries[-1]
        size = last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
        dist.broadcast(buffer[:size], src=src, group=group)
        yield from unpack(buffer, entries)


def _tell(entries: Any, src: int, group: dist.ProcessGroup | None, device: torch.device | None) -> Any:
    """Let all ranks of a group know what `src` says: the entries of its next bucket, None at the end."""
    word = [entries]
    dist.broadcast_object_list(word, src=src, group=group, device=device)
    return word[0]
