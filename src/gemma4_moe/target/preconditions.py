"""Where a conversion may write: never onto or into its source, never over what no checkpoint accounts for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.parents import is_checkpoint
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals, resolved
from gemma4_moe.errors import InputError, UsageError, command_line


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Check that `target` may be made from `source`. Raises what `check_place` and `check_existing` raise."""
    check_place(target, source)
    check_existing(target, overwrite=overwrite)


def check_order(source: str | Path, target: Path) -> None:
    """Check that the arguments were not exchanged: the target is no checkpoint if the source is not on this machine.

    Raises:
        UsageError: It is one, and the source is missing.
    """
    with refusals("look at source and target", target):
        exchanged = not expanded(source).exists() and is_checkpoint(target)
    if exchanged:
        raise UsageError(
            "no such directory, and the target is a checkpoint already",
            file=source,
            found=f"a checkpoint in {target}",
            hint=f"if SRC and DST are exchanged: {command_line('gemma4-moe', 'convert', target, Path(source))}; "
            "or name another directory",
        )


def check_place(target: Path, source: Path) -> None:
    """Check that `target` is not the source, above or below it, and that its parent exists."""
    here, there = resolved(target), resolved(source)
    with refusals("look at the target", target):
        parent_exists = here.parent.is_dir()
    if here == there or there in here.parents or here in there.parents:
        relation = "is" if here == there else "lies inside" if there in here.parents else "holds"
        raise UsageError(
            f"the target {relation} the source", file=here, found=f"source {there}", hint="name another directory"
        )
    if not parent_exists:
        raise UsageError(
            "the directory that should hold the target does not exist",
            file=here.parent,
            hint=f"make it first: {command_line('mkdir', '-p', here.parent)}",
        )


def check_existing(target: Path, *, overwrite: bool) -> None:
    """Check that whatever is at `target` is an empty directory, or with `overwrite` a checkpoint and nothing else."""
    with refusals("look at the target", target):
        if not target.is_symlink() and not target.exists():
            return
        if target.is_symlink() or not target.is_dir():
            raise UsageError(
                "the target exists and is not a directory",
                file=target,
                found="a link" if target.is_symlink() else "a file",
                hint="name a directory that does not exist yet",
            )
        here, cwd = resolved(target), Path.cwd()
        if here.is_mount():
            raise UsageError("the target is a mount point", file=target, hint="name a directory inside it")
        if here == cwd or here in cwd.parents:  # its user would go on to see the old directory
            raise UsageError(
                "the working directory lies in the target", file=target, hint="change to another directory"
            )
        if not any(target.iterdir()):
            return
    if overwrite:
        _check_replaceable(target)
        return
    hint = "name another directory"
    with suppress(UsageError):
        _check_replaceable(target)
        hint += ", or give --overwrite to replace it"
    raise UsageError("the target exists", file=target, hint=hint)


def _check_replaceable(target: Path) -> None:
    """Check that a checkpoint accounts for everything in `target`, so that nothing else is lost with it."""
    try:
        with open_checkpoint(target) as old, refusals("look at the target", target):
            directories = [f"{entry.name}/" for entry in target.iterdir() if entry.is_dir()]
            unknown = list(dict.fromkeys([*old.skipped, *directories]))
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
