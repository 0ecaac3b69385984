"""Work shared by a few threads. Its caller can be interrupted at any time, and then waits no longer than a moment."""

from __future__ import annotations

import time
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

#: Seconds that an interrupted caller waits for its threads. One that waits for a disk or the network may take longer.
_PATIENCE = 0.25


class StoppedError(Exception):
    """Another thread has failed, or the caller was interrupted."""


class SharedIterator(Generic[T]):
    """Yields each of the given items once, to whichever thread asks next."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._taking = Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        with self._taking:
            return next(self._items)


def run_in_threads(count: int, work: Callable[[Callable[[], None]], None], name: str = "gemma4-moe") -> None:
    """Call `work` in `count` threads, and return when all have ended.

    `work` is given a function to call between two short steps: it raises a `StoppedError` once another thread has
    failed, or the caller was interrupted. After an interrupt, a thread that waits for the disk or the network is left
    alone: it ends with its wait or with the process.

    Raises:
        BaseException: The first error of a thread, or the interrupt.
    """
    stopped = Event()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def check() -> None:
        if stopped.is_set():
            raise StoppedError

    def run() -> None:
        try:
            work(check)
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller
            stopped.set()
            ended.put(error)
        else:
            ended.put(None)

    threads = [Thread(target=run, name=f"{name}-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        failures = [failure for _ in threads if (failure := ended.get()) is not None]
    except BaseException:
        stopped.set()
        until = time.monotonic() + _PATIENCE
        for thread in threads:
            _join(thread, until)
        raise
    for failure in sorted(failures, key=lambda failure: isinstance(failure, StoppedError)):
        raise failure


def _join(thread: Thread, until: float) -> None:
    if thread.is_alive():  # one that was not started can't be waited for
        thread.join(max(0.0, until - time.monotonic()))
