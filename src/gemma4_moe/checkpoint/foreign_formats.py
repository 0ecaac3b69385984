"""Directories in the forms of `layout.foreign`: recognised by the names of files, and refused with a next step."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.errors import UnsupportedCheckpointError
from gemma4_moe.layout.foreign import FOREIGN, PARTS, Foreign

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.file import SafetensorsFile

#: Key of the header metadata with which torch.distributed.checkpoint marks files that hold parts of tensors.
_SHARDING_INFO = "DCP_SHARDING_INFO"


def refuse_foreign_files(directory: Path, names: Iterable[str]) -> None:
    """Raise an UnsupportedCheckpointError if `names`, the entries of `directory`, are those of another format.

    Names of directories end in a slash.
    """
    names = list(names)
    for form in FOREIGN:
        if form.file is None:
            continue
        own = [name for name in names if form.file.fullmatch(name)]
        others = [name for name in names if name not in own and name.endswith((".safetensors", INDEX_NAME))]
        if own and (form.always or not others):
            raise _refusal(form, form.name, directory, "Hugging Face or NeMo safetensors", own[0])


def refuse_partial_tensors(directory: Path, files: Mapping[str, SafetensorsFile]) -> None:
    """Raise an UnsupportedCheckpointError if a header says that its file holds parts of tensors."""
    for name, file in files.items():
        if _SHARDING_INFO in file.header.metadata:
            kind = "parts of tensors, one file for each rank"
            raise _refusal(PARTS, kind, directory, "whole tensors", f"{_SHARDING_INFO} in {name}")


def _refusal(form: Foreign, kind: str, directory: Path, expected: str, found: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"a checkpoint of another format: {kind}",
        form=form.name,
        file=directory,
        expected=expected,
        found=found,
        hint=form.hint.format(shlex.quote(str(directory))),
    )
