"""Files that hold parts of tensors, as torch.distributed.checkpoint's writer of safetensors leaves them.

Each rank writes its own parts, `shard-0000k-model-...safetensors`. A header has the shapes of the parts, and in its
metadata `DCP_SHARDING_INFO`: for each name, the offsets of its part in the whole tensor. The shape of the whole, and
the number of ranks, are nowhere; the config tells the shapes. NeMo AutoModel puts it into `.hf_metadata/`, with the
tokenizer.
"""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.checkpoint.parts import Part
from gemma4_moe.checkpoint.strict_json import is_unsigned, load_object, repeated_key
from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.file import SafetensorsFile

#: The key of the header metadata that marks files with parts of tensors.
_SHARDING_INFO = "DCP_SHARDING_INFO"

_OFFSETS = "saved_offsets"

_FILE = re.compile(r"shard-\d+-model-.*\.safetensors")

#: The directory, beside the files, of NeMo's config, generation config and tokenizer.
_METADATA = ".hf_metadata"

_AGAIN = "get the file again, or save the step again"


def is_part(name: str) -> bool:
    """Return whether the writer gives files such a name."""
    return _FILE.fullmatch(name) is not None


def holds_parts(files: Mapping[str, SafetensorsFile]) -> bool:
    """Return whether a header says that its file holds parts of tensors."""
    return any(_SHARDING_INFO in file.header.metadata for file in files.values())


def side_directory(path: Path) -> Path:
    """Return the directory with the config of a directory of parts."""
    place = path / _METADATA
    return place if (place / CONFIG_NAME).is_file() and not (path / CONFIG_NAME).is_file() else path


def parts_of(files: Mapping[str, SafetensorsFile]) -> dict[str, list[Part]]:
    """Return the parts of each tensor, by its name.

    Raises:
        CheckpointFormatError: A file does not say where in their tensors its parts are.
    """
    parts: dict[str, list[Part]] = {}
    for file in files.values():
        offsets = _offsets(file)
        for entry in file.header.entries:
            own = offsets.get(entry.name)
            if own is None or len(own) != len(entry.shape):
                raise CheckpointFormatError(
                    "a file of parts does not say where a part belongs",
                    tensor=entry.name,
                    file=file.path,
                    expected=f"{_OFFSETS} of {len(entry.shape)} integers in {_SHARDING_INFO}",
                    found="nothing" if own is None else list(own),
                    hint=_AGAIN,
                )
            parts.setdefault(entry.name, []).append(Part(file, entry.start, entry.dtype, own, entry.shape))
    return parts


def _offsets(file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
    text = file.header.metadata.get(_SHARDING_INFO)
    if text is None:
        problem, hint = "a file of whole tensors among files of parts", "keep files of another checkpoint elsewhere"
        raise CheckpointFormatError(problem, file=file.path, expected=f"{_SHARDING_INFO} in its metadata", hint=hint)
    members = load_object(text.encode(), file=file.path, what=_SHARDING_INFO)
    found = {}
    for name, value in members:
        own = dict(value).get(_OFFSETS) if isinstance(value, tuple) else None
        if not isinstance(own, list) or not all(map(is_unsigned, own)):
            raise CheckpointFormatError(
                f"{_SHARDING_INFO} is not what torch writes",
                tensor=name,
                file=file.path,
                expected=f"{_OFFSETS}, a list of integers",
                found=reprlib.repr(value),
                hint=_AGAIN,
            )
        found[name] = tuple(own)
    if (twice := repeated_key(members)) is not None:
        problem = f"{_SHARDING_INFO} names a tensor twice"
        raise CheckpointFormatError(problem, tensor=twice, file=file.path, hint=_AGAIN)
    return found
