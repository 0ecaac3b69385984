"""Checkpoints of other formats: recognised by their files' names, and refused with a next step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.errors import UnsupportedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.file import SafetensorsFile

#: Key of the header metadata with which torch.distributed.checkpoint marks files that hold parts of tensors.
_SHARDING_INFO = "DCP_SHARDING_INFO"


class ForeignFormat(NamedTuple):
    """A format that this package names and does not convert.

    `pattern` matches the name of a file that only this format has. If `beside_safetensors`, one such file tells the
    format even in a directory with other safetensors files or an index.
    """

    name: str
    pattern: str
    beside_safetensors: bool
    hint: str


_CONSOLIDATE = "consolidate it into Hugging Face safetensors with the framework that wrote it, then convert that"
_EXPORT = "export it to Hugging Face safetensors first, or start from the published checkpoint"
_MERGE = "merge the adapter into its base with PEFT first, then convert the merged model"
_QUANTISED = "GGUF is quantised and renamed: start from the Hugging Face checkpoint"
_UNPICKLED = "unpickling runs code: get the safetensors files, or save the model again with save_pretrained"

_PARTS = ForeignFormat("NeMo's unconsolidated step directory", r"shard-\d+-model-.*\.safetensors", True, _CONSOLIDATE)

#: Ordered: the first that matches any file names the directory.
FORMATS = (
    _PARTS,
    ForeignFormat("torch.distributed.checkpoint", r"\.metadata|.*\.distcp", True, _CONSOLIDATE),
    ForeignFormat("Orbax", r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt", True, _EXPORT),
    ForeignFormat("PEFT adapter", r"adapter_model\.(safetensors|bin)", False, _MERGE),
    ForeignFormat("GGUF", r".*\.gguf", False, _QUANTISED),
    ForeignFormat("pickled weights", r".*\.(bin|pt|pth|ckpt|pkl)", False, _UNPICKLED),
)


def refuse_foreign_files(directory: Path, names: Iterable[str]) -> None:
    """Raise an UnsupportedCheckpointError if `names`, the files of `directory`, are those of another format."""
    names = list(names)
    for form in FORMATS:
        own = [name for name in names if re.fullmatch(form.pattern, name, re.DOTALL)]
        others = [name for name in names if name not in own and name.endswith((".safetensors", INDEX_NAME))]
        if own and (form.beside_safetensors or not others):
            raise _refusal(form, form.name, directory, "Hugging Face or NeMo safetensors", own[0])


def refuse_partial_tensors(directory: Path, files: Mapping[str, SafetensorsFile]) -> None:
    """Raise an UnsupportedCheckpointError if a header says that its file holds parts of tensors."""
    for name, file in files.items():
        if _SHARDING_INFO in file.header.metadata:
            kind = "parts of tensors, one file for each rank"
            raise _refusal(_PARTS, kind, directory, "whole tensors", f"{_SHARDING_INFO} in {name}")


def _refusal(form: ForeignFormat, kind: str, directory: Path, expected: str, found: str) -> UnsupportedCheckpointError:
    problem = f"a checkpoint of another format: {kind}"
    return UnsupportedCheckpointError(
        problem, form=form.name, file=directory, expected=expected, found=found, hint=form.hint
    )
