"""Messages of a long run: its progress, and after a failure the files that it keeps on the disk."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich import progress

from gemma4_moe.errors import Gemma4MoEError, TargetBusyError, UnfinishedRunError, command_line
from gemma4_moe.sizes import format_size
from gemma4_moe.target.recovery import remains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from gemma4_moe.sizes import Progress

#: Seconds between two lines of progress if there is no terminal.
_INTERVAL = 5.0


@contextmanager
def shown_progress(console: Console, activity: str) -> Iterator[Progress]:
    """Give a callback that shows progress: a bar on a terminal, or else a line every few seconds."""
    if console.is_terminal:
        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
        speed = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        with progress.Progress(*columns, *speed, console=console) as bar:
            tasks: list[progress.TaskID] = []

            def advance(done: int, total: int) -> None:
                if not tasks:  # nothing is shown before the first byte
                    tasks.append(bar.add_task(activity, total=total))
                bar.update(tasks[0], completed=done, total=total)

            yield advance
        return
    started = said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _INTERVAL:
            said = now
            rate = format_size(int(done / (now - started)))
            line = f"{activity}: {format_size(done)} of {format_size(total)}, {rate}/s"
            console.print(line, highlight=False)

    yield show


@contextmanager
def telling_what_is_kept(say: Callable[[str], None], target: Path) -> Iterator[None]:
    """After a failure, name the files that are kept next to `target`, and the commands that resume or remove them."""
    try:
        yield
    except (TargetBusyError, UnfinishedRunError):
        raise  # its hint names the commands
    except BaseException:
        with suppress(Gemma4MoEError):  # the first error is the one to tell
            left = remains(target)
            if left is not None:
                say(f"kept on disk: {left.path}, {left.nbytes:,} bytes")
            if left is not None and left.command is not None:
                say(f"resume with: {left.command}")
                say(f"remove with: {command_line('gemma4-moe', 'clean', target)}")
        raise
