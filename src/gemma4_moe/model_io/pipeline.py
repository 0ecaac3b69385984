"""Read ranges of a checkpoint on several threads, share them with other ranks, and install them.

A disk, and the page cache as well, is at its speed only if several reads are on their way. Each thread has a slot of
memory and, for each GPU, a stream: while one thread reads, others copy to the device, exchange and convert.

A range that several ranks need is read by one of them, which broadcasts it. Ranks call their collectives in the order
of their jobs, which is the same for all; threads that only receive don't keep others from reading ahead.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from threading import Condition
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from gemma4_moe.converter.blocks import LOAD_BLOCKS, RECEIVED_BLOCKS
from gemma4_moe.distributed.collectives import AGREEMENT_SECONDS
from gemma4_moe.distributed.ranks import failing_in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gemma4_moe.checkpoint.stored import StoredTensor


class Exchange(NamedTuple):
    """The ranks that need a range, and the one that reads it for all.

    Attributes:
        group: Their process group.
        reader: The rank that reads, as torch's default process group counts it.
        reads: Whether it is this rank.
    """

    group: Any
    reader: int
    reads: bool


class Job(NamedTuple):
    """A range of a stored tensor, and the work that it is read for.

    Attributes:
        offset: The first byte, counted from the tensor's own start.
        size: Bytes.
        device: The device of the tensor that it is installed in.
        install: Takes the range as a flat tensor of the stored dtype, on that device or in a slot.
        exchange: The ranks that all have this job; None if no other rank does.
    """

    stored: StoredTensor
    offset: int
    size: int
    device: torch.device
    install: Callable[[torch.Tensor], None]
    exchange: Exchange | None = None

    @property
    def reads(self) -> bool:
        """Whether this rank reads the range."""
        return self.exchange is None or self.exchange.reads


#: How often a thread looks whether an exchange is complete, in seconds.
_POLL_SECONDS = 0.001

#: A job, and the number of exchanges that this rank's jobs before it have.
_Task = tuple[int, Job]


class Pipeline:
    """Runs the jobs of one load.

    Args:
        slot_bytes: The size of the largest job.
        devices: The devices of all jobs.
        installed: Called with the bytes of each job once it is installed, by one thread at a time.
    """

    def __init__(
        self, slot_bytes: int, devices: set[torch.device], installed: Callable[[int], None] = lambda _: None
    ) -> None:
        gpus = {device for device in devices if device.type == "cuda"}
        self._slots = torch.empty((LOAD_BLOCKS, slot_bytes), dtype=torch.uint8, pin_memory=bool(gpus))
        self._received_slots = self._slots[:0]  # allocated if something is received
        self._gpus, self._installed = gpus, installed
        self._changed = Condition()
        self._turn = self._read_bytes = 0
        self._failure: Exception | None = None
        self._ended = False

    def run(self, jobs: Iterable[Job]) -> int:
        """Run all jobs, and return how many bytes this rank read; they are installed then.

        If a job fails, nothing more is read or installed, and the error is raised. The jobs that other ranks have as
        well are exchanged to the last one before, whatever their bytes: no rank is left waiting, and all can agree
        afterwards on how it ended.

        Raises:
            ParallelError: An exchange failed.
        """
        reading: list[_Task] = []
        receiving: list[_Task] = []
        self._turn = self._read_bytes = turn = 0
        self._ended = False
        for job in jobs:
            (reading if job.reads else receiving).append((turn, job))
            turn += job.exchange is not None
        if receiving and not len(self._received_slots):
            self._received_slots = self._slots.new_empty((RECEIVED_BLOCKS, self._slots.shape[1]))
        lines = [(iter(reading), self._slots), (iter(receiving), self._received_slots)]
        with ThreadPoolExecutor(LOAD_BLOCKS + RECEIVED_BLOCKS) as pool:
            work = [(tasks, slot) for tasks, slots in lines for slot in slots]
            threads = [pool.submit(self._work, tasks, slot, self._new_streams()) for tasks, slot in work]
            try:
                for thread in threads:
                    thread.result()
            finally:
                self._end()
        if self._failure is not None:
            raise self._failure
        return self._read_bytes

    def _new_streams(self) -> dict[torch.device, torch.cuda.Stream]:
        """Return a stream for each GPU, which begins after the work that is on the current one."""
        streams = {gpu: torch.cuda.Stream(gpu) for gpu in self._gpus}  # type: ignore[no-untyped-call]
        for gpu, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(gpu))
        return streams

    def _work(
        self, tasks: Iterator[_Task], slot: torch.Tensor, streams: Mapping[torch.device, torch.cuda.Stream]
    ) -> None:
        """Run one job after the other, until none is left or this load has ended."""
        try:
            while (task := self._next(tasks)) is not None:
                turn, job = task
                self._do(job, turn, slot[: job.size], streams.get(job.device))
        except BaseException:
            self._end()
            raise

    def _next(self, tasks: Iterator[_Task]) -> _Task | None:
        with self._changed:
            left = (task for task in tasks if self._failure is None or task[1].exchange is not None)
            return None if self._ended else next(left, None)

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _do(self, job: Job, turn: int, raw: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        if job.reads:
            self._attempt(lambda: self._read(job, raw))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None:
                raw = raw.to(job.device, non_blocking=True) if job.reads else raw.new_empty(job.size, device=job.device)
            if job.exchange is not None:
                self._exchange(raw, job.exchange, turn)
            self._attempt(lambda: job.install(raw.view(getattr(torch, job.stored.dtype.name))))
        if stream is not None:
            stream.synchronize()  # the slot is read again
        with self._changed:
            self._attempt(lambda: self._installed(job.size))

    def _read(self, job: Job, raw: torch.Tensor) -> None:
        job.stored.read_into(raw.numpy().data, job.offset)
        with self._changed:
            self._read_bytes += job.size

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something if nothing has failed yet. A failure is raised once no other rank waits for this one."""
        if self._failure is None and not self._ended:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - raised by `run`
                self._failure = self._failure or error

    def _exchange(self, raw: torch.Tensor, exchange: Exchange, turn: int) -> None:
        """Send a range to the ranks that need it, or receive it, once the jobs before have begun to."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == turn or self._ended)
            if self._ended:
                return
            with failing_in_words("share what they read"):
                work = dist.broadcast(raw, exchange.reader, exchange.group, async_op=True)
            self._turn += 1
            self._changed.notify_all()
        self._complete(work)

    def _complete(self, work: dist.Work) -> None:
        """Wait for an exchange, unless this load has ended: a rank is lost then, and others may wait for it forever."""
        deadline = time.monotonic() + AGREEMENT_SECONDS
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if self._ended:
                return
        with failing_in_words("share what they read"):
            work.wait(timedelta(seconds=_POLL_SECONDS))
