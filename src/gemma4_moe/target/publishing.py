"""Whether a conversion to a directory was interrupted while it was published, for readers that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.directory import control_directory
from gemma4_moe.checkpoint.storage import refusals, resolved
from gemma4_moe.errors import CheckpointFormatError, command_line
from gemma4_moe.target.recovery import PUBLISHING

if TYPE_CHECKING:
    from pathlib import Path


def check_published(directory: Path) -> None:
    """Check that no publish of `directory` is unfinished. Nothing on the disk is changed.

    Raises:
        CheckpointFormatError: A conversion was interrupted between its last file and the end of its publish.
        StorageError: The disk or its permissions refused.
    """
    control = control_directory(resolved(directory))
    with refusals("look at the directory", control):
        interrupted = (control / PUBLISHING).exists()
    if interrupted:
        raise CheckpointFormatError(
            "a conversion to this directory was interrupted while it was published",
            file=directory,
            expected="a directory whose conversion has ended",
            found=control,
            hint=f"{command_line('gemma4-moe', 'clean', directory)}, "
            "or finish it: the same gemma4-moe convert again with --resume",
        )
