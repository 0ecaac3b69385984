"""How far a long run is, said on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gemma4_moe.quantities import format_size

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

#: Between two lines where there is no terminal, in seconds.
_INTERVAL = 5.0


class Talk:
    """A progress callback for `convert` and `verify`. Use it as a context manager."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._started = self._said = time.monotonic()
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Take note that `done` of `total` bytes are through."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._said >= _INTERVAL:
            self._said = now
            rate = done / (now - self._started)
            self._console.print(
                f"{self._what}: {format_size(done)} of {format_size(total)}, {format_size(int(rate))}/s",
                highlight=False,
            )
