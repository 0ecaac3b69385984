"""A directory of torch.distributed.checkpoint: `.metadata`, and files `*.distcp` with each rank's parts of tensors.

Parts are read in place, by ranges of bytes; torch is not needed. `.metadata` is a pickle, and so is the description of
each part; both are read by `restricted_pickle`. Entries that are not tensors are pickles too, and stay unread. Names
may be nested (`{"model": {...}, "optimizer": {...}}`): the model is the one group that has experts' names.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.dcp_parts import dtype_of, open_part
from gemma4_moe.checkpoint.file import IdentifiedFile
from gemma4_moe.checkpoint.index import is_bare_name
from gemma4_moe.checkpoint.restricted_pickle import Record, load
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.errors import CheckpointFormatError, UnsupportedCheckpointError
from gemma4_moe.layout.names import fold_names, lookup
from gemma4_moe.layout.table import DOWN, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.parts import Part

METADATA_NAME = ".metadata"

#: The longest metadata that is read, in bytes. A model of 1,000 tensors on 256 ranks needs about 50 MB.
LONGEST_METADATA = 256 * 2**20

_CHECKPOINT = "torch.distributed.checkpoint"

#: First components of names that are no model's: the state of a training loop.
_OTHER_STATE = frozenset(
    {
        *("optim", "optimizer", "optimizers", "optim_state", "state", "param_groups"),
        *("lr_scheduler", "lr_schedulers", "scheduler", "train_state", "dataloader", "rng", "rng_state"),
    }
)

_DTYPE = re.compile(r"(bfloat|float|complex|u?int)\d+\w*|bool")

_AGAIN = "the directory is damaged or incomplete: name another step, or get its files again"


@dataclass(frozen=True, slots=True)
class Opened:
    """An open directory: its files, the shape and the parts of each tensor of the model, and what was left out."""

    files: dict[str, IdentifiedFile]
    tensors: dict[str, tuple[tuple[int, ...], list[Part]]]
    left_out: str | None


def open_dcp(path: Path, opened: Callable[[IdentifiedFile], IdentifiedFile]) -> Opened:
    """Open the files of a directory; `opened` is given each, to close it.

    Raises:
        CheckpointFormatError: The metadata or a part is damaged, or not as torch writes it.
        UnsupportedCheckpointError: No group of tensors, or more than one, has experts' names; or parts are compressed.
    """
    raw = read_whole(path / METADATA_NAME, LONGEST_METADATA)
    digest = hashlib.sha256(raw).hexdigest()
    metadata = load(raw, _stand_ins(), file=path / METADATA_NAME)
    described, stored, nested = (
        _mapping(metadata, name, path) for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    names = {key: _nested(key, nested.get(key)) for key in described}
    tensors = {key: value for key, value in described.items() if isinstance(value, Record) and value.get("chunks")}
    model = _model([names[key] for key in tensors], path)
    keys = {key for key in tensors if names[key][0] == model and not _is_other(names[key][1])}
    files = {METADATA_NAME: opened(IdentifiedFile(path / METADATA_NAME, digest))}
    places = _places(stored, keys, path)
    for name in sorted({place.get("relative_path") for place in places.values()}):
        files[name] = opened(IdentifiedFile(path / name, digest))
    found = {}
    for key in keys:
        shape, chunks = _shape(tensors[key].get("size"), path), tensors[key].get("chunks")
        dtype = dtype_of(getattr(tensors[key].get("properties"), "state", None), key, path)
        parts = []
        for chunk in chunks:
            box = _shape(chunk.get("offsets"), path), _shape(chunk.get("sizes"), path)
            place = places.get((key, box[0]))
            if place is None:
                problem = "the metadata does not say where a part is"
                raise CheckpointFormatError(problem, tensor=key, file=path / METADATA_NAME, found=box, hint=_AGAIN)
            parts.append(open_part(files[place.get("relative_path")], place, dtype, *box))
        found[names[key][1]] = shape, parts
    others = [key for key in described if key not in keys]
    return Opened(files, found, _said(others, tensors) if others else None)


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Return what stands in for the names of torch's metadata: fresh classes, so that no pickle changes another's."""
    records = {
        (f"{_CHECKPOINT}.metadata", name): type(name, (Record,), {})
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta"),
        )
    }
    return _Names(
        {
            **records,
            (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): type("_StorageInfo", (Record,), {}),
            (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): lambda number: number,
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): str,
            ("pathlib", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
            ("pathlib", "Path"): lambda *parts: "/".join(map(str, parts)),
            ("pathlib._local", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
        }
    )


class _Names(dict[tuple[str, str], Any]):
    """Stand-ins; a dtype of torch stands for its name."""

    def __missing__(self, key: tuple[str, str]) -> str:
        module, name = key
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        raise KeyError(key)


def _mapping(metadata: Any, name: str, path: Path) -> Mapping[Any, Any]:
    found = metadata.get(name) if isinstance(metadata, Record) else None
    if not isinstance(found, dict) and not (name == "planner_data" and found is None):
        problem, expected = "the metadata is not what torch.distributed.checkpoint writes", f"a dict {name}"
        raise CheckpointFormatError(problem, file=path / METADATA_NAME, expected=expected, hint=_AGAIN)
    return found or {}


def _nested(key: Any, place: Any) -> tuple[tuple[str, ...], str]:
    """Return the group and the name of an entry: its true path in nested dicts, if the planner has stored it."""
    if isinstance(place, tuple) and place and all(isinstance(part, str | int) for part in place):
        return tuple(map(str, place[:-1])), str(place[-1])
    return (), str(key)


def _is_other(name: str) -> bool:
    return name.partition(".")[0] in _OTHER_STATE


def _model(names: Iterable[tuple[tuple[str, ...], str]], path: Path) -> tuple[str, ...]:
    """Return the group of the model: the only one with names of experts, or else the outermost, or `model`."""
    groups = {group for group, name in names if any(lookup(name, layout) for layout in Layout) and not _is_other(name)}
    for group in ((), ("model",)):
        if group in groups:
            return group
    if len(groups) == 1:
        return groups.pop()
    raise UnsupportedCheckpointError(
        "no mixture-of-experts model in a directory of torch.distributed.checkpoint"
        if not groups
        else "several models in a directory of torch.distributed.checkpoint",
        file=path,
        expected=f"one group of names such as <prefix>layers.<number>.{DOWN.hf}",
        found=", ".join(sorted(".".join(group) for group in groups)) or "none",
        hint='save the model alone, or under "model"',
    )


def _places(stored: Mapping[Any, Any], keys: set[Any], path: Path) -> dict[tuple[Any, tuple[int, ...]], Record]:
    """Return the storage of each part of the model, by its tensor's key and its offsets."""
    found = {}
    for index, place in stored.items():
        if not isinstance(index, Record) or index.get("fqn") not in keys:
            continue
        name = place.get("relative_path") if isinstance(place, Record) else None
        if not isinstance(name, str) or not is_bare_name(name) or name == METADATA_NAME:
            problem, expected = (
                "a part is in a file outside of the directory",
                "the bare name of a file beside .metadata",
            )
            raise CheckpointFormatError(
                problem, tensor=index.get("fqn"), file=path / METADATA_NAME, expected=expected, found=name, hint=_AGAIN
            )
        found[index.get("fqn"), _shape(index.get("offset"), path)] = place
    return found


def _shape(value: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < 2**62 for size in value):
        problem = "the metadata has a shape or offsets that are none"
        raise CheckpointFormatError(problem, file=path / METADATA_NAME, found=str(value)[:100], hint=_AGAIN)
    return value


def _said(others: list[Any], tensors: Mapping[Any, Any]) -> str:
    """Return the sentence on entries that are no part of the model."""
    folded = list(fold_names(map(str, others)))
    shown = ", ".join(folded[:4]) + (" and others" if len(folded) > 4 else "")
    count = sum(key in tensors for key in others)
    return f"left out: {count} tensors and {len(others) - count} other values that are not the model's: {shown}"
