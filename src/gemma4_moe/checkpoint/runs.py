"""The directories of a NeMo training run: which model a run, a step or a pointer to a step means.

NeMo AutoModel writes `RUN/epoch_E_step_S/model/`, and in some of them `model/consolidated/`. `RUN/LATEST` and
`RUN/LOWEST_VAL` are links to steps, or files `LATEST.txt` and `LOWEST_VAL.txt` where links can't be made. A step that
holds `.incomplete` was interrupted while it was saved.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.checkpoint.parents import is_checkpoint
from gemma4_moe.checkpoint.side_files import is_of_macos
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.errors import CheckpointFormatError, command_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_STEP = re.compile(r"epoch_(\d{1,18})_step_(\d{1,18})", re.ASCII)
_POINTERS = ("LATEST", "LOWEST_VAL")
_INCOMPLETE = ".incomplete"
_MODEL, _CONSOLIDATED = "model", "consolidated"

#: The longest pointer that is read, in bytes: the longest path of Linux.
_LONGEST_POINTER = 4096

#: Ends of the names of files that a step's model directory has, if it has weights.
_WEIGHTS = (".safetensors", ".distcp", INDEX_NAME)


class Taken(NamedTuple):
    """The model's directory that a path means, and a sentence that names it if the path is another one."""

    path: Path
    notes: tuple[str, ...] = ()


def taken(path: Path) -> Taken:
    """Return the directory of the model that a path means: the path itself, unless it is a run or a step.

    Of a run, the step of `LATEST` is taken. If that is interrupted or missing, the complete step of the highest number
    is taken.

    Raises:
        CheckpointFormatError: The step was interrupted while it was saved, or each step of a run was.
    """
    with refusals("look at the directory", path):
        pointed = path if path.exists() or path.name not in _POINTERS else _read_pointer(path.parent, path.name)
        if pointed is None or not pointed.is_dir():
            return Taken(path)
        step, why = (pointed.resolve() if pointed.is_symlink() else pointed), ""
        if not _has_weights(pointed) and not (pointed / _MODEL).is_dir():
            steps = _steps(pointed)
            if not steps:
                return Taken(path)
            step, why = _of_run(pointed, steps)
        elif _is_interrupted(step):
            raise _interrupted(step)
        model = step if _has_weights(step) else step / _MODEL
        if model != step and is_checkpoint(model / _CONSOLIDATED):
            model = model / _CONSOLIDATED
    if not model.is_dir():
        return Taken(path)
    return Taken(model, () if model == path else (f"of {path}, the model in {model} was taken{why}",))


def _steps(run: Path) -> list[Path]:
    """Return the steps of a run, those of the lowest number first; a link to a step is none."""
    found = [
        (int(match[2]), int(match[1]), each)
        for each in run.iterdir()
        if (match := _STEP.fullmatch(each.name)) is not None and (each / _MODEL).is_dir() and not each.is_symlink()
    ]
    return [step for _, _, step in sorted(found)]


def _of_run(run: Path, steps: Sequence[Path]) -> tuple[Path, str]:
    """Return the step of a run that is taken, and why."""
    complete = [step for step in steps if not _is_interrupted(step)]
    if not complete:
        raise _interrupted(steps[-1])
    latest = _read_pointer(run, "LATEST")
    known = None if latest is None else next((s for s in complete if s.resolve() == latest.resolve()), None)
    step = known or complete[-1]
    why = "its LATEST" if known is not None else "its last complete step"
    left = f"; {len(steps) - len(complete)} were interrupted" if len(complete) < len(steps) else ""
    return step, f": {why} of {len(steps)}{left}"


def _read_pointer(run: Path, name: str) -> Path | None:
    """Return the directory that a pointer of a run leads to, by its link or its file."""
    if (run / name).is_dir():
        return run / name
    file = run / f"{name}.txt"
    if not file.is_file():
        return None
    return run / read_whole(file, _LONGEST_POINTER).decode(errors="replace").strip()


def _has_weights(place: Path) -> bool:
    return any(path.name.endswith(_WEIGHTS) and not is_of_macos(path.name) for path in place.iterdir())


def _is_interrupted(place: Path) -> bool:
    """Return whether a directory is an interrupted step, its model, or its consolidated model."""
    above = {_MODEL: (place.parent,), _CONSOLIDATED: (place.parent.parent,)}.get(place.name, ())
    return any((each / _INCOMPLETE).exists() for each in (place, *above))


def _interrupted(step: Path) -> CheckpointFormatError:
    return CheckpointFormatError(
        "the step was interrupted while it was saved",
        file=step,
        expected="a step that was saved to its end",
        found=_INCOMPLETE,
        hint=f"name another step: {command_line('ls', step.parent)}",
    )
