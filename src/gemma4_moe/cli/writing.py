"""The course of the commands that write a checkpoint: their plan for --dry-run, their progress, and their results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma4_moe.cli.options import Output
    from gemma4_moe.converter.conversion import Conversion


def show_plan(output: Output, source: str, target: Path | None, arguments: dict[str, Any]) -> None:
    """Print the plan of a conversion; with a target it must be one that may be made."""
    from gemma4_moe.checkpoint.paths import expanded
    from gemma4_moe.cli import report
    from gemma4_moe.converter import preview
    from gemma4_moe.target.preconditions import check_order, check_target

    overwrite = arguments.pop("overwrite", False)
    for name in ("workers", "buffered", "no_read_back", "sha256", "resume", "break_lock", "card"):
        arguments.pop(name, None)
    if target is not None:
        check_order(source, target)
        check_target(target, expanded(source), overwrite=overwrite)
    found = preview.plan(source, target, **arguments)
    output.give(report.preview(found))
    output.say(*report.space_notes(found.space))
    if target is not None and found.space.missing_bytes:
        click.get_current_context().exit(StorageError.exit_status)


def write(
    output: Output, title: str, function: Callable[..., Conversion], target: Path, arguments: dict[str, Any]
) -> Conversion:
    """Call `convert`, or `merge` with its sources, with a progress bar; print and return the result."""
    from gemma4_moe.cli import report
    from gemma4_moe.cli.progress import shown_progress, telling_what_is_kept
    from gemma4_moe.distributed.ranks import under_torchrun

    read_back = not arguments.pop("no_read_back")
    with (
        under_torchrun(),
        telling_what_is_kept(output.warn, target),
        shown_progress(output.talk, title) as progress,
    ):
        done = function(target=target, read_back=read_back, progress=progress, **arguments)
    output.say(*(f"note: {note}" for note in done.notes))
    if done.skipped:
        output.say(f"skipped: {', '.join(done.skipped)}")
    output.give(report.conversion(done), is_faultless=True)
    return done
