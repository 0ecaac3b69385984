"""Fill the next bucket while the last one is on the wire or is read.

If GPUs share the tensors, a bucket is filled on a stream of its own, and the one after it is begun before the
consumer's stream waits for it: while one bucket is on the wire, the next is converted. Otherwise a bucket is filled
when it is asked for: one GPU's kernels are at the memory's speed already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe.refit.buckets import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_moe.refit.buckets import PlannedBucket
    from gemma4_moe.refit.lending import Lender, Loan


class Ahead:
    """Fills the buckets of one pass in their order.

    Args:
        lender: Lends their memory.
        least: The least bytes of a buffer.
        fill: Fills a bucket on the current stream.
        device: The GPU on which the next bucket is filled ahead; None if none is.
    """

    def __init__(
        self, lender: Lender, least: int, fill: Callable[[PlannedBucket, Bucket], None], device: torch.device | None
    ) -> None:
        self.lender = lender
        self._least = least
        self._fill = fill
        count = 0 if device is None else 2
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]
        self._begun: tuple[Bucket, Any] | None = None  # with the event after its filling

    def take(self, planned: PlannedBucket, following: PlannedBucket | None) -> Bucket:
        """Return a bucket for the current stream, and begin the one after it if there is memory for it.

        Raises:
            UsageError: The consumer still holds every buffer.
        """
        begun = self._begun
        if begun is None:
            begun = self._filled(planned, self.lender.lend(planned.size, _label(planned), self._least))
        self._begun = None
        if following is not None and self._streams:
            loan = self.lender.lend_if_free(following.size, _label(following), self._least)
            if loan is not None:
                self._begun = self._filled(following, loan)
        bucket, event = begun
        if event is not None:
            torch.cuda.current_stream(bucket.buffer.device).wait_event(event)
        return bucket

    def close(self) -> None:
        """Let the current stream wait for all that was begun, or its memory would be freed too early.

        `record_stream` would do so as well, but the allocator could then not use the memory at once in the next pass.
        """
        self._begun = None
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def _filled(self, planned: PlannedBucket, loan: Loan) -> tuple[Bucket, Any]:
        bucket = Bucket(loan, planned)
        if not self._streams:
            self._fill(planned, bucket)
            return bucket, None
        stream = self._streams[0]
        self._streams.reverse()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._fill(planned, bucket)
            return bucket, stream.record_event()


def _label(planned: PlannedBucket) -> str:
    return f"the bucket from {planned.entries[0].name} on"
