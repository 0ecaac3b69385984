"""What is said of a long run: how far it is, and after a failure what stays on the disk."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gemma4_moe.errors import Gemma4MoEError, TargetBusyError, command_line
from gemma4_moe.sizes import format_size
from gemma4_moe.target.recovery import remains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console

#: Between two lines where there is no terminal, in seconds.
_INTERVAL = 5.0


class Talk:
    """A progress callback for `convert` and `verify`: a bar on a terminal, a line every few seconds elsewhere.

    Use it as a context manager.
    """

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


@contextmanager
def saying_what_stays(say: Callable[[str], None], target: Path) -> Iterator[None]:
    """After a failure, say what stays on the disk beside `target`, and which commands go on with it or remove it."""
    try:
        yield
    except TargetBusyError:
        raise
    except BaseException:
        with suppress(Gemma4MoEError):  # the first error is the one to tell
            left = remains(target)
            if left is not None:
                say(f"stays on disk: {left.path}, {left.nbytes:,} bytes")
            if left is not None and left.resumable:
                command = [argument for argument in click.get_current_context().obj if argument != "--resume"]
                say(f"resume with: {command_line('gemma4-moe', *command, '--resume')}")
                say(f"remove with: {command_line('gemma4-moe', 'clean', target)}")
        raise
