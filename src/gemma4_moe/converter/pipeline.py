"""Four threads, read, compute, hash and write, joined by fixed buffers: the disk works while blocks are computed.

A failure in one thread, or an interrupt in the caller's, stops the others at their next step.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from gemma4_moe.checkpoint.readers import allocate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gemma4_moe.converter.blocks import Block, Memory

_T = TypeVar("_T")
_R = TypeVar("_R")


class Steps(Protocol[_R]):
    """What is done with a block. Each method runs in a thread of its own, and sees the blocks in their order."""

    def read(self, block: Block, buffer: memoryview) -> Sequence[memoryview]:
        """Read the block's source bytes, and return where in `buffer` each of its reads is."""

    def compute(self, block: Block, source: Sequence[memoryview], buffer: memoryview) -> None:
        """Make the block's target bytes in `buffer`."""

    def digest(self, block: Block, buffer: memoryview) -> _R:
        """Return what is to be known of the block's target bytes."""

    def write(self, block: Block, buffer: memoryview, digest: _R) -> None:
        """Write the block's target bytes."""


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


def run(blocks: Iterable[Block], steps: Steps[_R], memory: Memory) -> None:
    """Take every block through the four steps. A channel carries None after its last block.

    Raises:
        Whatever a step raised first.
    """
    line = _Line()
    free_in = _Channel(line, _buffers(memory))
    free_out = _Channel(line, _buffers(memory))
    was_read: _Channel[tuple[Block, memoryview, Sequence[memoryview]] | None] = _Channel(line)
    computed: _Channel[tuple[Block, memoryview] | None] = _Channel(line)
    digested: _Channel[tuple[Block, memoryview, _R] | None] = _Channel(line)

    def read() -> None:
        with line.stopping_on_failure():
            for block in blocks:
                buffer = free_in.take()
                was_read.put((block, buffer, steps.read(block, buffer)))
            was_read.put(None)

    def compute() -> None:
        with line.stopping_on_failure():
            while (item := was_read.take()) is not None:
                block, buffer, source = item
                target = free_out.take()
                steps.compute(block, source, target)
                free_in.put(buffer)
                computed.put((block, target))
            computed.put(None)

    def digest() -> None:
        with line.stopping_on_failure():
            while (item := computed.take()) is not None:
                block, buffer = item
                digested.put((block, buffer, steps.digest(block, buffer)))
            digested.put(None)

    def write() -> None:
        with line.stopping_on_failure():
            while (item := digested.take()) is not None:
                block, buffer, found = item
                steps.write(block, buffer, found)
                free_out.put(buffer)

    with ThreadPoolExecutor(4, "gemma4-moe") as threads, line.stopping_on_failure():
        futures = [threads.submit(step) for step in (read, compute, digest, write)]
        wait(futures)  # each that fails stops the others
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
            raise failure


def _buffers(memory: Memory) -> list[memoryview]:
    return [allocate(memory.buffer_bytes) for _ in range(memory.buffers)]
