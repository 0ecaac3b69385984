"""The files of a directory and its index must agree, on names and on the place of each tensor.

A native directory that we write has no index, and its files are not called model: transformers then finds no weights in
it, where it would start with random experts. The names count the files instead.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.errors import CheckpointFormatError, command_line
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

SUFFIX = ".safetensors"

#: What the names of the weight files begin with in each layout.
STEMS = {Layout.HF: "model", Layout.NEMO: "nemo"}

_NUMBERED = re.compile(rf"{STEMS[Layout.NEMO]}-(\d{{5}})-of-(\d{{5}})\{SUFFIX}", re.ASCII)

_AGAIN = "get the index again, and the file that is not as it says"


def file_name(layout: Layout, number: int, count: int) -> str:
    """Return the name of weight file `number`, from 1 on, of `count` files."""
    return f"{STEMS[layout]}{SUFFIX}" if count == 1 else f"{STEMS[layout]}-{number:05}-of-{count:05}{SUFFIX}"


def are_numbered(weights: Collection[str]) -> bool:
    """Return whether the names of weight files count them, as those of a native directory do."""
    return any(_NUMBERED.fullmatch(name) for name in weights)


def check_numbered(path: Path, weights: Collection[str]) -> None:
    """Check that weight files which `are_numbered` are all that they count, and no others."""
    numbers = [(int(match[1]), int(match[2])) for name in weights if (match := _NUMBERED.fullmatch(name))]
    count = max(count for _, count in numbers)
    expected = {file_name(Layout.NEMO, number, count) for number in range(1, min(count, len(weights) + 9) + 1)}
    if extra := sorted(set(weights) - expected):
        raise CheckpointFormatError(
            "a safetensors file that the others do not count",
            file=path,
            expected=f"{count} files such as {file_name(Layout.NEMO, 1, count)}",
            found=_some(extra),
            hint=f"some readers would take it for the model; keep it elsewhere: {_move(path, extra)}",
        )
    if missing := sorted(expected - set(weights)):
        raise CheckpointFormatError(
            "a weight file that the others count is not there",
            file=path,
            expected=_some(missing),
            found=_some(weights),
            hint="convert again, or copy the whole directory again",
        )


def no_single_file(path: Path, weights: list[str]) -> CheckpointFormatError:
    """Return the error for a directory without an index that has no weight file, or several."""
    if not weights:
        expected = f"{INDEX_NAME} and the files that it names, or one {SUFFIX} file"
        hint = "name the directory that holds the weights"
        return CheckpointFormatError("no safetensors file in the directory", file=path, expected=expected, hint=hint)
    problem = "several safetensors files, and no index that says which belong together"
    others = [name for name in weights if name != f"model{SUFFIX}"]
    hint = "get the index, or keep elsewhere what is not the checkpoint: " + _move(path, others or weights[1:])
    return CheckpointFormatError(problem, file=path, expected=INDEX_NAME, found=_some(weights), hint=hint)


def compare_names(index: Path, named: set[str], present: set[str], files: Collection[str]) -> None:
    """Check that an index names the weight files that are there, all of them and no others."""
    if absent := sorted(named - present):
        begun = [name for name in files if name.endswith(".incomplete") and name.startswith(tuple(absent))]
        raise CheckpointFormatError(
            "the index names a file that is not there",
            file=index,
            expected=_some(absent),
            found=f"{_some(begun)}, whose download has not ended" if begun else _some(present) or "no safetensors file",
            hint=f"fetch {_some(absent)} from where the checkpoint came from, into {index.parent}",
        )
    if extra := sorted(present - named):
        raise CheckpointFormatError(
            "a safetensors file that the index does not name",
            file=index,
            expected="every safetensors file of the directory in the index",
            found=_some(extra),
            hint=f"some readers would take it for the model; keep it elsewhere: {_move(index.parent, extra)}",
        )


def compare_tensors(index: Path, weight_map: Mapping[str, str], places: Mapping[str, Path]) -> None:
    """Check that an index names the file of each tensor; `places` are the files that hold them."""
    for name, file in weight_map.items():
        place = places[name].name if name in places else "in no file"
        if place != file:
            problem = "the index and the files disagree on where a tensor is"
            raise CheckpointFormatError(problem, tensor=name, file=index, expected=file, found=place, hint=_AGAIN)
    for name, path in places.items():
        if name not in weight_map:
            problem, expected = "a tensor that the index does not name", f"every tensor in {INDEX_NAME}"
            raise CheckpointFormatError(problem, tensor=name, file=path, expected=expected, hint=_AGAIN)


def _move(directory: Path, names: Collection[str]) -> str:
    """Return the command that moves files of a user out of a checkpoint, into a new directory beside it."""
    aside = directory.with_name(f"{directory.name}-other-files")
    move = command_line("mv", "--", *(directory / name for name in names), aside)
    return f"{command_line('mkdir', '--', aside)} && {move}"


def _some(names: Collection[str]) -> str:
    """Name a few of `names`, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
