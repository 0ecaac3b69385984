"""What a checkpoint is, from headers, index and config.json: layout, spelling, sizes, and everything wrong with it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import ConfigFile
from gemma4_moe.checkpoint.recognition import config_sizes, recognise, wrong_tensors
from gemma4_moe.errors import ConfigError, InputError, UnsupportedCheckpointError
from gemma4_moe.hub.source import open_source
from gemma4_moe.layout.names import fold_names, lookup, natural_key
from gemma4_moe.layout.table import Layout, Operation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        source: The directory, or the Hub id.
        layout: Its layout, or None where it is neither or can't be told.
        spelling: "current", "legacy", both, the name of a foreign form, or "none".
        model_type: config.json's model_type, or None.
        sizes: E, H and I, and L, the number of layers, as config.json gives them.
        tensors: Number of tensors.
        parameters: Number of their elements.
        bytes: Their size.
        folds: The tensors, folded over layers.
        groups: Bytes by what they are for: experts, router, everything else by module.
        problems: Why it can't be converted; empty if it can.
        left_behind: Names in the directory that a conversion does not take along.
    """

    source: Path
    layout: Layout | None
    spelling: str
    model_type: str | None
    sizes: dict[str, int]
    tensors: int
    parameters: int
    bytes: int
    folds: tuple[Fold, ...]
    groups: dict[str, int]
    problems: tuple[InputError, ...]
    left_behind: tuple[str, ...]


def inspect(source: str | Path, *, revision: str | None = None) -> Inspection:
    """Say what the checkpoint `source` is. Reads headers, index and config.json alone, on the Hub too.

    Args:
        source: A directory, or a Hub id.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        InputError: The directory is no checkpoint, or a file in it breaks the rules of its format.
        StorageError: The disk or its permissions refused.
    """
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(open_source(source, revision))
        except UnsupportedCheckpointError as error:
            return Inspection(Path(source), None, error.form or "none", None, {}, 0, 0, 0, (), {}, (error,), ())
        return _inspect(Path(source), checkpoint)


def _inspect(source: Path, checkpoint: Checkpoint) -> Inspection:
    problems: list[InputError] = []
    config = _config(checkpoint, problems)
    recognition = recognise(checkpoint.tensors, config)
    if recognition.refusal is not None and not (problems and isinstance(recognition.refusal, ConfigError)):
        problems.append(recognition.refusal)  # an unreadable config is a problem once, not twice
    if recognition.layout is not None:
        problems += wrong_tensors(checkpoint.tensors.values(), recognition.layout, config, {})
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: natural_key(tensor.name))
    groups: dict[str, int] = {}
    for tensor in tensors:
        group = _group(tensor.name, recognition.layout)
        groups[group] = groups.get(group, 0) + tensor.nbytes
    layers = {} if config.layers is None else {"L": config.layers}
    return Inspection(
        source=source,
        layout=recognition.layout,
        spelling=recognition.spelling,
        model_type=config.model_type,
        sizes=config_sizes(config) | layers,
        tensors=len(tensors),
        parameters=sum(tensor.nbytes * 8 // tensor.dtype.bits for tensor in tensors),
        bytes=checkpoint.total_bytes,
        folds=fold(tensors),
        groups=groups,
        problems=tuple(problems),
        left_behind=checkpoint.left_behind,
    )


def _config(checkpoint: Checkpoint, problems: list[InputError]) -> ConfigFile:
    try:
        return checkpoint.read_config()
    except ConfigError as error:
        problems.append(error)
        return ConfigFile(checkpoint.path / "config.json", {}, None, None, None, None, None)


def _group(name: str, layout: Layout | None) -> str:
    found = None if layout is None else lookup(name, layout)
    if found is None:
        for part in ("vision_tower", "embed_vision", "self_attn", "mlp", "embed_tokens"):
            if f".{part}." in f".{name}":
                return part
        return "norms and scalars"
    return "router" if found.rule.operation is Operation.KEEP or not found.rule.in_nemo else "experts"


@dataclass(frozen=True, slots=True)
class Fold:
    """Tensors whose names differ in numbers only.

    Attributes:
        name: Their name, each number as the set of its values.
        shape: Their shape.
        dtype: Their dtype's name.
        tensors: How many there are.
        bytes: Their size together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensors: int
    bytes: int


def fold(tensors: Iterable[StoredTensor]) -> tuple[Fold, ...]:
    """Fold tensors of one shape and dtype whose names differ in numbers only, in the order of their first."""
    forms: dict[tuple[tuple[int, ...], str], dict[str, StoredTensor]] = {}
    order: dict[str, int] = {}
    for tensor in tensors:
        order[tensor.name] = len(order)
        forms.setdefault((tensor.shape, tensor.dtype.name), {})[tensor.name] = tensor
    found = {
        order[names[0]]: Fold(name, shape, dtype, len(names), sum(members[member].nbytes for member in names))
        for (shape, dtype), members in forms.items()
        for name, names in fold_names(members).items()
    }
    return tuple(found[place] for place in sorted(found))
