"""Checkpoints of other kinds, recognised by the names of their files and refused with what to do instead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.errors import UnsupportedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.file import SafetensorsFile

#: Key of the header metadata with which torch.distributed.checkpoint marks files that hold parts of tensors.
_SHARDING_INFO = "DCP_SHARDING_INFO"


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A format that this package names and does not convert.

    Attributes:
        name: What it is called.
        pattern: Matches the name of a file that only this format has.
        beside_safetensors: Whether the format is meant even where the directory holds other safetensors files, or an
            index of them.
        hint: What to do instead.
    """

    name: str
    pattern: re.Pattern[str]
    beside_safetensors: bool
    hint: str


_CONSOLIDATE = "consolidate it into Hugging Face safetensors with the framework that wrote it, then convert that"

#: Ordered: the first that matches any file names the directory.
FORMATS = tuple(
    ForeignFormat(name, re.compile(pattern, re.DOTALL), beside_safetensors, hint)
    for name, pattern, beside_safetensors, hint in (
        ("NeMo's unconsolidated step directory", r"shard-\d+-model-.*\.safetensors", True, _CONSOLIDATE),
        ("torch.distributed.checkpoint", r"\.metadata|.*\.distcp", True, _CONSOLIDATE),
        (
            "Orbax",
            r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt",
            True,
            "export it to Hugging Face safetensors first, or start from the published checkpoint",
        ),
        (
            "PEFT adapter",
            r"adapter_model\.(safetensors|bin)",
            False,
            "merge the adapter into its base with PEFT first, then convert the merged model",
        ),
        ("GGUF", r".*\.gguf", False, "GGUF is quantised and renamed: start from the Hugging Face checkpoint"),
        (
            "pickled weights",
            r".*\.(bin|pt|pth|ckpt|pkl)",
            False,
            "unpickling runs code: get the safetensors files, or save the model again with save_pretrained",
        ),
    )
)


def refuse_foreign_files(directory: Path, names: Iterable[str]) -> None:
    """Raise an UnsupportedCheckpointError if `names`, the files of `directory`, are those of another format."""
    names = list(names)
    for form in FORMATS:
        own = [name for name in names if form.pattern.fullmatch(name)]
        others = [name for name in names if name not in own and name.endswith((".safetensors", INDEX_NAME))]
        if own and (form.beside_safetensors or not others):
            raise UnsupportedCheckpointError(
                f"a checkpoint of another format: {form.name}",
                form=form.name,
                file=directory,
                expected="Hugging Face or NeMo safetensors",
                found=own[0],
                hint=form.hint,
            )


def refuse_partial_tensors(directory: Path, files: Mapping[str, SafetensorsFile]) -> None:
    """Raise an UnsupportedCheckpointError if a header says that its file holds parts of tensors."""
    for name, file in files.items():
        if _SHARDING_INFO in file.header.metadata:
            raise UnsupportedCheckpointError(
                "a checkpoint of another format: parts of tensors, one file for each rank",
                form=FORMATS[0].name,
                file=directory,
                expected="whole tensors",
                found=f"{_SHARDING_INFO} in {name}",
                hint=_CONSOLIDATE,
            )
