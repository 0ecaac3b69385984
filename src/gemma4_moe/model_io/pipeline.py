"""Read ranges of a checkpoint on several threads, and let each thread install what it has read.

A disk, and the page cache as well, is at its speed only if several reads are on their way. Each thread has a slot of
memory and, for each GPU, a stream: while one thread reads, others copy to the device and convert.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from gemma4_moe.converter.blocks import LOAD_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.checkpoint.directory import StoredTensor


class Job(NamedTuple):
    """A range of a stored tensor, and the work that it is read for.

    Attributes:
        offset: The first byte, counted from the tensor's own start.
        size: Bytes.
        device: The device of the tensor that it is installed in.
        install: Takes the range as a flat tensor of the stored dtype, on that device or in a slot.
    """

    stored: StoredTensor
    offset: int
    size: int
    device: torch.device
    install: Callable[[torch.Tensor], None]


class Pipeline:
    """Runs the jobs of one load.

    Args:
        slot_bytes: The size of the largest job.
        devices: The devices of all jobs.
    """

    def __init__(self, slot_bytes: int, devices: set[torch.device]) -> None:
        gpus = {device for device in devices if device.type == "cuda"}
        self._slots = torch.empty((LOAD_BLOCKS, slot_bytes), dtype=torch.uint8, pin_memory=bool(gpus))
        self._gpus = gpus
        self._lock = Lock()
        self._ended = False

    def run(self, jobs: Iterator[Job]) -> int:
        """Run all jobs, and return how many bytes were read; they are installed then.

        If a job fails, or the caller is interrupted, no further one is begun, and the error is raised.
        """
        with ThreadPoolExecutor(LOAD_BLOCKS) as pool:
            threads = [pool.submit(self._work, jobs, slot, self._new_streams()) for slot in self._slots]
            try:
                return sum(thread.result() for thread in threads)
            finally:
                self._ended = True

    def _new_streams(self) -> dict[torch.device, torch.cuda.Stream]:
        """Return a stream for each GPU, which begins after the work that is on the current one."""
        streams = {gpu: torch.cuda.Stream(gpu) for gpu in self._gpus}  # type: ignore[no-untyped-call]
        for gpu, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(gpu))
        return streams

    def _work(self, jobs: Iterator[Job], slot: torch.Tensor, streams: Mapping[torch.device, torch.cuda.Stream]) -> int:
        """Run one job after the other, until none is left or one fails; return how many bytes were read."""
        read_bytes = 0
        try:
            while (job := self._next(jobs)) is not None:
                self._do(job, slot[: job.size], streams.get(job.device))
                read_bytes += job.size
        except BaseException:
            self._ended = True
            raise
        return read_bytes

    def _next(self, jobs: Iterator[Job]) -> Job | None:
        with self._lock:
            return None if self._ended else next(jobs, None)

    def _do(self, job: Job, raw: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        job.stored.read_into(raw.numpy().data, job.offset)
        values = raw.view(getattr(torch, job.stored.dtype.name))
        if stream is None:
            job.install(values)
            return
        with torch.cuda.stream(stream):
            job.install(values.to(job.device, non_blocking=True))
        stream.synchronize()  # the slot is read again
