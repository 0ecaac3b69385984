"""Blocks in flight: a few threads that each take a block through all its steps, one thread at a time in each step.

So the disk reads one block while another is computed, a third is hashed and a fourth is written. No more blocks are in
flight than there are buffers. A failure in one thread, or an interrupt of the caller, stops the others at their next
step.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.readers import allocate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gemma4_moe.converter.blocks import Block, Memory
    from gemma4_moe.converter.steps import ConversionSteps


class Stopped(Exception):  # noqa: N818 - a signal between threads, not an error
    """Another thread has failed, or the caller was interrupted."""


class _Turn:
    """Lets one thread at a time into a step, until the run is stopped."""

    stopped = False

    @contextmanager
    def at(self, step: Lock) -> Iterator[None]:
        with step:
            if self.stopped:
                raise Stopped
            yield


def run(blocks: Iterable[Block], steps: ConversionSteps, memory: Memory) -> None:
    """Take every block through its four steps; blocks are read in their order.

    Raises:
        The first error that a step raised.
    """
    turn, waiting = _Turn(), iter(blocks)
    reading, computing, hashing, writing = Lock(), Lock(), Lock(), Lock()

    def work() -> None:
        source, target = allocate(memory.buffer_bytes), allocate(memory.buffer_bytes)
        try:
            while True:
                with turn.at(reading):
                    if (block := next(waiting, None)) is None:
                        return
                    found = steps.read(block, source)
                with turn.at(computing):
                    facts = steps.compute(block, found, target)
                with turn.at(hashing):
                    piece = steps.digest(block, target, facts)
                with turn.at(writing):
                    steps.write(block, target, piece)
        except BaseException:
            turn.stopped = True
            raise

    with ThreadPoolExecutor(memory.buffers, "gemma4-moe") as threads:
        try:
            futures = [threads.submit(work) for _ in range(memory.buffers)]
            wait(futures)  # each that fails stops the others
        finally:
            turn.stopped = True
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
            raise failure
