"""Files that are not what their names say: a pointer of Git LFS or a web page in place of the file itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import CheckpointFormatError, command_line

if TYPE_CHECKING:
    from pathlib import Path

#: The first bytes of each, and how many bytes of a file tell them apart.
_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html")
ENOUGH = 64


def check_genuine(begin: bytes, path: Path) -> None:
    """Check the first bytes of a file, up to `ENOUGH`; as few as eight tell both impostors from a safetensors file.

    Raises:
        CheckpointFormatError: They are those of a Git LFS pointer or of a web page.
    """
    lowered = begin.lstrip().lower()[: len(_POINTER)]
    if len(lowered) >= len(b"version") and _POINTER.startswith(lowered):
        pull = command_line("git", "-C", str(path.parent), "lfs", "pull")
        raise _impostor("a pointer of Git LFS", path, f"fetch the file that it stands for: {pull}")
    if len(lowered) >= len(b"<html") and any(lowered.startswith(page[: len(lowered)]) for page in _PAGES):
        hint = f"fetch {path.name} again: the server answered with a page, such as one that asks for a login"
        raise _impostor("a web page", path, hint)


def _impostor(kind: str, path: Path, hint: str) -> CheckpointFormatError:
    problem = f"{kind} in place of the file"
    return CheckpointFormatError(problem, file=path, expected=f"the contents of {path.name}", found=kind, hint=hint)
