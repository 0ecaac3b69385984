"""A directory that is no checkpoint and holds some, one or two levels down: named, with the checkpoints to name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.checkpoint.side_files import is_of_macos
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import CheckpointFormatError, command_line
from gemma4_moe.layout.names import natural_key

if TYPE_CHECKING:
    from pathlib import Path

#: How many checkpoints a message names.
_SHOWN = 8


def refuse_parent(path: Path) -> None:
    """Raise a CheckpointFormatError if checkpoints are below `path`, one or two levels down."""
    found = checkpoints_below(path)
    if found:
        names = [str(each.relative_to(path)) for each in found]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise CheckpointFormatError(
            "the directory holds checkpoints, and is none itself",
            file=path,
            expected="a directory of safetensors files",
            found=", ".join(names[:_SHOWN]) + more,
            hint=f"name one of them: {command_line('gemma4-moe', 'inspect', found[0])}",
        )


def checkpoints_below(path: Path) -> list[Path]:
    """Return the checkpoints one or two levels below a directory. A link to a directory below is not followed."""
    with refusals("list the directory", path):
        places = [place for pattern in ("*", "*/*") for place in path.glob(pattern) if not _is_hidden(place, path)]
        found = [place for place in places if place.is_dir() and not place.is_symlink() and is_checkpoint(place)]
    return sorted(found, key=lambda place: natural_key(str(place)))


def _is_hidden(place: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in place.relative_to(path).parts)


def is_checkpoint(place: Path) -> bool:
    """Return whether a directory has a config.json and a safetensors file; neither is opened."""
    return (place / CONFIG_NAME).is_file() and any(not is_of_macos(path.name) for path in place.glob("*.safetensors"))
