"""Directories in the forms of `layout.foreign`: recognised by the names of files, and refused with a next step."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.errors import UnsupportedCheckpointError
from gemma4_moe.layout.foreign import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


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
            raise UnsupportedCheckpointError(
                f"a checkpoint of another format: {form.name}",
                form=form.name,
                file=directory,
                expected="Hugging Face or NeMo safetensors",
                found=own[0],
                hint=form.hint.format(shlex.quote(str(directory))),
            )
