"""Where a conversion may write: never onto or into its source, never over what no checkpoint accounts for."""

from __future__ import annotations

from pathlib import Path

from gemma4_moe.checkpoints.directories import open_checkpoint
from gemma4_moe.checkpoints.manifest import MANIFEST_NAME
from gemma4_moe.checkpoints.storage import refusals
from gemma4_moe.errors import InputError, UsageError


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Check that `target` may be made from `source`.

    Raises:
        UsageError: It is the source, holds the source or lies in it; its parent does not exist; it exists and is not
            empty, and may not be replaced.
        StorageError: The disk or its permissions refused.
    """
    with refusals("look at the target", target):
        _check_place(target.resolve(), source.resolve())
        if target.is_symlink() or target.exists():
            _check_existing(target, overwrite=overwrite)


def _check_place(target: Path, source: Path) -> None:
    if target == source or source in target.parents or target in source.parents:
        relation = "is" if target == source else "lies inside" if source in target.parents else "holds"
        raise UsageError(
            f"the target {relation} the source", file=target, found=f"source {source}", hint="name another directory"
        )
    if not target.parent.is_dir():
        raise UsageError(
            "the directory that should hold the target does not exist",
            file=target.parent,
            hint=f"make it first: mkdir -p {target.parent}",
        )


def _check_existing(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or not target.is_dir():
        raise UsageError(
            "the target exists and is not a directory",
            file=target,
            found="a link" if target.is_symlink() else "a file",
            hint="name a directory that does not exist yet",
        )
    if target.is_mount():
        raise UsageError("the target is a mount point", file=target, hint="name a directory inside it")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            "the target exists", file=target, hint="name another directory, or give --overwrite to replace it"
        )
    _check_replaceable(target)


def _check_replaceable(target: Path) -> None:
    """Check that a checkpoint accounts for everything in `target`, so that nothing else is lost with it."""
    here, cwd = target.resolve(), Path.cwd()
    if here == cwd or here in cwd.parents:
        raise UsageError("the working directory lies in the target", file=target, hint="change to another directory")
    try:
        with open_checkpoint(target) as old:
            unknown = [name for name in old.left_behind if name != MANIFEST_NAME]
    except InputError as error:
        raise UsageError(
            f"the target is not a checkpoint that may be replaced: {error.problem}",
            file=target,
            hint="remove it yourself, or name another directory",
        ) from error
    if unknown:
        raise UsageError(
            "the target holds files that no checkpoint accounts for",
            file=target,
            found=", ".join(unknown[:8]),
            hint="move them away, or name another directory",
        )
