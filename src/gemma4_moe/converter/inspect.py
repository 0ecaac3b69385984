"""The inspection of a checkpoint: layout, spelling, sizes and problems, from headers, index and config.json."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.completeness import uncalled, unsaid
from gemma4_moe.checkpoint.config import ConfigFile, read_config
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, claimed_size, parse_index
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import recognise, wrong_tensors
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.converter.notes import opening_notes, uncalled_notes
from gemma4_moe.errors import CheckpointFormatError, ConfigError, InputError, UnsupportedCheckpointError
from gemma4_moe.hub.source import is_hub_id, open_source
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import fold_names, lookup, natural_key
from gemma4_moe.layout.table import Layout, Operation
from gemma4_moe.sizes import format_size
from gemma4_moe.target.recovery import check_published

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor

#: Bytes of the buffer through which values are read.
_MEMORY = 64 * 2**20


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """The result of `inspect`.

    Attributes:
        source: The directory, or the Hub id.
        layout: Its layout; None if its names are those of both layouts, or of neither.
        spelling: "current", "legacy", both, the name of a foreign form, or "none".
        model_type: config.json's model_type, or None.
        sizes: E, H and I, and L, the number of layers, as config.json gives them.
        tensors: Number of tensors.
        parameters: Number of their elements.
        bytes: Their size.
        folds: The tensors, folded over layers.
        groups: Bytes of the experts, of the router, and of each other module.
        problems: The reasons why it can't be converted; empty if it can.
        skipped: Names in the directory that a conversion does not copy.
        notes: Sentences on what is worth knowing and no obstacle: tensors that the config does not call for, or a
            config that does not say which tensors there are; and odd values, if these were asked for.
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
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = "no known layout" if self.layout is None else f"{self.layout} ({self.spelling})"
        size = f"{self.tensors:,} tensors, {format_size(self.bytes)}, {len(self.problems)} problems"
        return f"<Inspection of {self.source}: {what}, {size}>"


def inspect(source: str | Path, *, revision: str | None = None, values: bool = False) -> Inspection:
    """Return what the checkpoint `source` holds and what is wrong with it, by default without reading a tensor.

    Headers, index and config.json are read, on the Hub too. Nothing on the disk is changed.

    Args:
        source: A directory, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        values: Read all tensors, and note what is odd in their values; a model on the Hub is read in place.

    Raises:
        InputError: The directory is no checkpoint, a file in it breaks the rules of its format, or its publish was
            interrupted.
    """
    if not is_hub_id(source):
        check_published(expanded(source))
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(open_source(source, revision, stream=values))
        except UnsupportedCheckpointError as error:
            return Inspection(Path(source), None, error.form or "none", None, {}, 0, 0, 0, (), {}, (error,), ())
        except CheckpointFormatError as error:
            index = expanded(source) / INDEX_NAME
            if not index.is_file():
                raise
            return _of_index(index, error)
        return _inspect(Path(source), checkpoint, values=values)


def _of_index(index: Path, problem: CheckpointFormatError) -> Inspection:
    """Return what an index tells of a checkpoint with a file that is missing or damaged; else raise `problem`."""
    try:
        raw = read_whole(index, LONGEST_INDEX)
        names, size = parse_index(raw, file=index), claimed_size(raw)
        config = read_config(index.parent)
    except InputError:
        raise problem from None
    found = recognise(names, config)
    problems = (problem,) if found.refusal is None else (problem, found.refusal)
    note = "a file is missing or damaged: names and bytes are those of the index, and shapes are not known"
    return Inspection(
        index.parent,
        found.layout,
        found.spelling,
        config.model_type,
        _sizes(config),
        len(names),
        0,
        size or 0,
        (),
        {},
        problems,
        (),
        (note,),
    )


def _inspect(source: Path, checkpoint: Checkpoint, *, values: bool) -> Inspection:
    problems: list[InputError] = []
    notes = [*opening_notes(checkpoint)]
    try:
        config = checkpoint.read_config()
    except ConfigError as error:
        problems.append(error)
        config = ConfigFile(checkpoint.path / "config.json", {}, None, {}, None)
    recognition = recognise(checkpoint.tensors, config)
    if recognition.refusal is not None and not (problems and isinstance(recognition.refusal, ConfigError)):
        problems.append(recognition.refusal)  # an unreadable config is a problem once, not twice
    if recognition.layout is not None:
        inventory = Inventory(recognition.layout, config.sizes)
        problems += wrong_tensors(checkpoint.tensors.values(), inventory, config)
        notes += _notes(checkpoint, recognition.layout, config) if not problems else []
    if values:
        from gemma4_moe.checkpoint.values import scales_of, scan_checkpoint, value_notes

        odd = scan_checkpoint(checkpoint, recognition.layout, _MEMORY)
        notes += value_notes(odd.document(), scales_of(checkpoint, recognition.layout))
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: natural_key(tensor.name))
    groups: dict[str, int] = {}
    for tensor in tensors:
        group = _group(tensor.name, recognition.layout)
        groups[group] = groups.get(group, 0) + tensor.nbytes
    return Inspection(
        source=source,
        layout=recognition.layout,
        spelling=recognition.spelling,
        model_type=config.model_type,
        sizes=_sizes(config),
        tensors=len(tensors),
        parameters=sum(tensor.nbytes * 8 // tensor.dtype.bits for tensor in tensors),
        bytes=checkpoint.total_bytes,
        folds=fold(tensors),
        groups=groups,
        problems=tuple(problems),
        skipped=checkpoint.skipped,
        notes=tuple(notes),
    )


def _sizes(config: ConfigFile) -> dict[str, int]:
    return config.sizes | ({} if config.layers is None else {"L": config.layers})


def _notes(checkpoint: Checkpoint, layout: Layout, config: ConfigFile) -> list[str]:
    field = unsaid(config)
    if field is None:
        return [*uncalled_notes(uncalled(checkpoint.tensors, layout, config))]
    return [f"config.json does not say which tensors the model has: it lacks {field}; missing ones can't be named"]


def _group(name: str, layout: Layout | None) -> str:
    found = None if layout is None else lookup(name, layout)
    if found is None:
        for part in ("vision_tower", "embed_vision", "self_attn", "mlp", "embed_tokens"):
            if f".{part}." in f".{name}":
                return part
        return "norms and scalars"
    return "router" if found.rule.operation is Operation.KEEP or not found.rule.in_nemo else "experts"


class Fold(NamedTuple):
    """Tensors whose names differ in numbers only; in `name` each number is replaced by the set of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensors: int
    bytes: int


def fold(tensors: Iterable[StoredTensor]) -> tuple[Fold, ...]:
    """Fold tensors of one shape and dtype whose names differ in numbers only, in the order of their first."""
    forms: dict[tuple[tuple[int, ...], str], dict[str, int]] = {}
    order: dict[str, int] = {}
    for tensor in tensors:
        order[tensor.name] = len(order)
        forms.setdefault((tensor.shape, tensor.dtype.name), {})[tensor.name] = tensor.nbytes
    found = [
        (order[names[0]], Fold(name, shape, dtype, len(names), sum(sizes[member] for member in names)))
        for (shape, dtype), sizes in forms.items()
        for name, names in fold_names(sizes).items()
    ]
    return tuple(fold for _, fold in sorted(found))
