"""Send buckets to the ranks of a receiver group by `torch.distributed` broadcasts.

Nobody enters a broadcast before all have said that they are ready for it, through a key-value store and within a time
limit. So a receiver that failed, is slow, late or dead is found outside of collectives. After an error the next pass
works in the same group, unless a rank died: then it needs a new group.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.distributed.ranks import failing_in_words
from gemma4_moe.refit import endings
from gemma4_moe.refit.buckets import SMALL_BYTES, Bucket, BucketEntry, aligned, copying, unpack
from gemma4_moe.refit.lending import Lender
from gemma4_moe.refit.mailboxes import Mailbox, Passes, passes_between

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.refit.stream import WeightStream


def send(
    stream: WeightStream, group: dist.ProcessGroup | None = None, *, timeout: float = endings.TIMEOUT_SECONDS
) -> None:
    """Broadcast one pass of a stream to the ranks of a group that call `receive`; return when their blocks have ended.

    A trainer rank that gets no tensors only takes part in the gathers, and need not be in the group.

    Args:
        stream: The stream.
        group: This rank and all receivers; the default is the group of all ranks.
        timeout: The most seconds that a receiver takes to come, to read a bucket, or to end its block.

    Raises:
        ParallelError: A receiver failed, died, abandoned the pass, or took longer than `timeout`.
    """
    if not stream.keeps:
        for _ in stream.buckets():
            pass
        return
    own = dist.get_rank()
    passes = [passes_between(own, rank, timeout) for rank in dist.get_process_group_ranks(group) if rank != own]
    buckets = stream.buckets()
    receivers: list[Mailbox] = []
    try:
        receivers += _opened(passes)
        for bucket in buckets:
            _broadcast(bucket, receivers, group, timeout)
            del bucket
        _tell(receivers, "end")
        _wait_for(receivers, "end its `with` block")
        _tell(receivers, "over")
    except BaseException as error:
        _tell(receivers, "failed", endings.text_of(error))
        raise
    finally:
        buckets.close()  # type: ignore[attr-defined]  # the other trainer ranks learn of it


def _opened(passes: list[Passes]) -> list[Mailbox]:
    """Wait until all receivers have come, and open the pass with each."""
    tokens = [each.wait_for_receiver() for each in passes]
    return [each.open(token) for each, token in zip(passes, tokens, strict=True)]


def _broadcast(bucket: Bucket, receivers: list[Mailbox], group: dist.ProcessGroup | None, timeout: float) -> None:
    """Offer a bucket, and broadcast it once every receiver has memory for it."""
    label = bucket.entries[0].name
    _tell(receivers, "bucket", bucket.entries)
    _wait_for(receivers, "ask for it", label)
    _tell(receivers, "go")
    _run(bucket.buffer, dist.get_rank(), group, timeout)


def _tell(receivers: list[Mailbox], kind: str, content: Any = None) -> None:
    for receiver in receivers:
        receiver.put(kind, content)


def _wait_for(receivers: list[Mailbox], action: str, bucket: str | None = None) -> None:
    for receiver in receivers:
        receiver.get(action, bucket)


@contextmanager
def receive(
    src: int,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    buffers: int = 4,
    copy_up_to: int = SMALL_BYTES,
    timeout: float = endings.TIMEOUT_SECONDS,
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Open a pass, and give its (hf name, tensor) pairs to a `with` block.

    `with receive(src) as tensors: engine.load_weights(tensors)`.

    The consumer may keep tensors: the memory of a bucket is used again once all tensors of it are dropped. An error in
    the block ends the pass on all sides, in the sender with its text. A block that ends before the last tensor abandons
    the pass.

    Args:
        src: The sender's rank.
        group: The sender's group.
        device: The buffers' device, which the group's backend must serve.
        buffers: The most buffers that are alive, each as large as a bucket.
        copy_up_to: Tensors of at most so many bytes are copies; see `Bucket.tensors`.
        timeout: The most seconds that the sender takes to come, or to fill a bucket.

    Raises:
        ParallelError: The sender or another receiver failed, died, or took longer than `timeout`.
        UsageError: The consumer holds buckets in all `buffers` and asks for more.
    """
    passes = passes_between(src, dist.get_rank(), timeout)
    with passes.opened() as sender:
        incoming = _Incoming(sender, src, group, Lender(torch.device(device), buffers), copy_up_to, timeout)
        try:
            yield incoming.tensors()
        except BaseException as error:
            sender.put("failed", endings.text_of(error))
            raise
        if incoming.ended:
            sender.put("done")
            sender.get_last("end the pass")
        else:
            sender.put("failed", endings.ABANDONED)


class _Incoming:
    """The buckets of one pass, on a receiver."""

    def __init__(
        self,
        sender: Mailbox,
        src: int,
        group: dist.ProcessGroup | None,
        lender: Lender,
        copy_up_to: int,
        timeout: float,
    ) -> None:
        self.ended = False
        self._sender = sender
        self._src = src
        self._group = group
        self._lender = lender
        self._copy_up_to = copy_up_to
        self._timeout = timeout

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the pass."""
        label: str | None = None
        largest = 0
        while (message := self._sender.get("offer the next bucket", label)).kind != "end":
            entries = [BucketEntry(*entry) for entry in message.content]
            label, size = entries[0].name, entries[-1].offset + aligned(entries[-1].nbytes)
            largest = max(largest, size)
            loan = self._lender.lend(size, f"the bucket from {label} on", at_least=largest)
            self._sender.put("ready")
            self._sender.get("broadcast the bucket", label)
            _run(loan.memory, self._src, self._group, self._timeout)
            views = copying(reversed(unpack(loan.memory, entries)), self._copy_up_to)
            del loan
            while views:
                yield views.pop()
        self.ended = True


def _run(buffer: torch.Tensor, src: int, group: dist.ProcessGroup | None, timeout: float) -> None:
    with failing_in_words("broadcast a bucket"):
        dist.broadcast(buffer, src=src, group=group, async_op=True).wait(timedelta(seconds=timeout))
