"""Messages of a long run: its progress, and after a failure the files that it keeps on the disk."""

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

#: Seconds between two lines of progress if there is no terminal.
_INTERVAL = 5.0


class ProgressLine:
    """A progress callback: a bar on a terminal, or else a line every few seconds.

    Use it as a context manager.
    """

    def __init__(self, console: Console, activity: str) -> None:
        self._console = console
        self._activity = activity
        self._started = self._said = time.monotonic()
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(activity, total=None)

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
        """Show that `done` of `total` bytes are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._said >= _INTERVAL:
            self._said = now
            rate = done / (now - self._started)
            self._console.print(
                f"{self._activity}: {format_size(done)} of {format_size(total)}, {format_size(int(rate))}/s",
                highlight=False,
            )


@contextmanager
def telling_what_is_kept(say: Callable[[str], None], target: Path) -> Iterator[None]:
    """After a failure, name the files that are kept next to `target`, and the commands that resume or remove them."""
    try:
        yield
    except TargetBusyError:
        raise
    except BaseException:
        with suppress(Gemma4MoEError):  # the first error is the one to tell
            left = remains(target)
            if left is not None:
                say(f"kept on disk: {left.path}, {left.nbytes:,} bytes")
            if left is not None and left.resumable:
                command = [argument for argument in click.get_current_context().obj if argument != "--resume"]
                say(f"resume with: {command_line('gemma4-moe', *command, '--resume')}")
                say(f"remove with: {command_line('gemma4-moe', 'clean', target)}")
        raise
