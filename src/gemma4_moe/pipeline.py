"""Three threads, read, compute and write, joined by fixed buffers: while one block is computed, others are on the disk.

A failure in one thread, or an interrupt in the caller's, stops the others at their next step.
"""

from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gemma4_moe.blocks import Block, Memory

_T = TypeVar("_T")


class Steps(Protocol):
    """What is done with a block. Each method runs in a thread of its own."""

    def read(self, block: Block, into: memoryview) -> None:
        """Fill the start of `into` with the block's source bytes."""

    def compute(self, block: Block, source: memoryview, into: memoryview) -> None:
        """Fill the start of `into` with the block's target bytes. Not called for a block that is copied."""

    def write(self, block: Block, source: memoryview) -> None:
        """Write the block's target bytes, the start of `source`."""


class Stopped(Exception):  # noqa: N818 - a signal between threads, not an error
    """Another thread has failed, or the caller was interrupted."""


class _Line:
    """Joins the threads of one run: what they wait on, and whether the run goes on."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.stopped = False

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    @contextmanager
    def stopping_on_failure(self) -> Iterator[None]:
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self.stop()


class _Channel(Generic[_T]):
    """A queue between two threads that gives up when the run is stopped."""

    def __init__(self, line: _Line, items: Iterable[_T] = ()) -> None:
        self._line = line
        self._items = deque(items)

    def put(self, item: _T) -> None:
        with self._line.changed:
            self._items.append(item)
            self._line.changed.notify_all()

    def take(self) -> _T:
        with self._line.changed:
            while not self._items and not self._line.stopped:
                self._line.changed.wait()
            if self._line.stopped:
                raise Stopped
            return self._items.popleft()


#: A block and the buffer that holds it; None ends the run.
_Filled = tuple["Block", memoryview] | None


def run(blocks: Iterable[Block], steps: Steps, memory: Memory) -> None:
    """Take every block through the three steps.

    Raises:
        Whatever a step raised first.
    """
    line = _Line()
    free_in = _Channel(line, _buffers(memory))
    free_out = _Channel(line, _buffers(memory))
    was_read: _Channel[_Filled] = _Channel(line)
    computed: _Channel[tuple[Block, memoryview, _Channel[memoryview]] | None] = _Channel(line)

    def read() -> None:
        with line.stopping_on_failure():
            for block in blocks:
                buffer = free_in.take()
                steps.read(block, buffer)
                was_read.put((block, buffer))
            was_read.put(None)

    def compute() -> None:
        with line.stopping_on_failure():
            while (item := was_read.take()) is not None:
                block, source = item
                if block.is_copy:
                    computed.put((block, source, free_in))
                    continue
                target = free_out.take()
                steps.compute(block, source, target)
                free_in.put(source)
                computed.put((block, target, free_out))
            computed.put(None)

    def write() -> None:
        with line.stopping_on_failure():
            while (item := computed.take()) is not None:
                block, buffer, home = item
                steps.write(block, buffer)
                home.put(buffer)

    with ThreadPoolExecutor(3, "gemma4-moe") as threads, line.stopping_on_failure():
        futures = [threads.submit(step) for step in (read, compute, write)]
        wait(futures, return_when=FIRST_EXCEPTION)
        failures = [failure for future in futures if future.done() and (failure := future.exception()) is not None]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
            raise failure


def _buffers(memory: Memory) -> list[memoryview]:
    """Return buffers that start on a page; their memory is taken when it is first written."""
    return [memoryview(mmap.mmap(-1, max(1, memory.buffer_bytes))) for _ in range(memory.buffers)]
