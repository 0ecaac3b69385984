"""What a conversion will do, from headers alone: each output tensor, where its bytes come from, and in which file.

Planning checks everything that names, shapes and the config can tell, so that a conversion that starts can only fail
for what the bytes or the disk hold.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe import dtypes
from gemma4_moe.blocks import DEFAULT_MEMORY, Memory, plan_memory
from gemma4_moe.checking import check_tensors
from gemma4_moe.checkpoints.header_layout import layout_header
from gemma4_moe.checkpoints.manifest import read_folded
from gemma4_moe.errors import UsageError
from gemma4_moe.layouts import DOWN, SCALE, Layout, MoEName, Operation
from gemma4_moe.notes import cast_notes
from gemma4_moe.quantities import parse_size
from gemma4_moe.recognising import recognise
from gemma4_moe.sources import is_hub_id, open_headers, require_hub_id
from gemma4_moe.space import Space, measure_space
from gemma4_moe.transforms import converted_shape, scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gemma4_moe.checkpoints.directories import Checkpoint, StoredTensor
    from gemma4_moe.checkpoints.header import TensorEntry
    from gemma4_moe.checkpoints.manifest import Folded
    from gemma4_moe.dtypes import DType
    from gemma4_moe.inventory import Owner

DEFAULT_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the target.

    Attributes:
        name: Its name.
        dtype: Its dtype.
        shape: Its shape.
        operation: What makes it from `source`.
        source: The source tensor that it comes from; None for a `per_expert_scale`.
        scale: The source tensor whose values multiply its experts, or None.
        folded: What the source's manifest says was folded into it, or None.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    operation: Operation
    source: StoredTensor | None
    scale: StoredTensor | None = None
    folded: Folded | None = None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One safetensors file of the target.

    Attributes:
        name: Its bare name.
        header: Its first bytes.
        entries: Its tensors in the order of their data.
        size: Its size in bytes.
    """

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, ready to run.

    Attributes:
        source_layout: Layout of the source.
        spelling: Spelling of the source.
        target_layout: Layout of the target.
        tensors: The target's tensors by name.
        files: The target's weight files.
        cast: The dtype that all tensors are cast to that can be, or None.
        inexact: For each cast that can change values: source dtype, target dtype, number of tensors.
    """

    source_layout: Layout
    spelling: str
    target_layout: Layout
    tensors: Mapping[str, PlannedTensor]
    files: tuple[PlannedFile, ...]
    cast: DType | None
    inexact: Mapping[tuple[DType, DType], int]

    @property
    def target_bytes(self) -> int:
        """Size in bytes of all weight files of the target."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Preview:
    """What `convert` would do with a source.

    Attributes:
        source: The directory, or the Hub id.
        plan: The plan.
        memory: The buffers that it would use.
        source_tensors: Number of tensors of the source.
        source_bytes: Their size.
        space: The space that it would need, and what there is.
        side_files: Names of the files that would be taken along unchanged.
        left_behind: Names in the source directory that would not.
        notes: What is to be known of the values: casts that round, and tensors that are not cast.
    """

    source: Path
    plan: Plan
    memory: Memory
    source_tensors: int
    source_bytes: int
    space: Space
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    notes: tuple[str, ...]


def plan(
    source: str | Path,
    target: str | Path | None = None,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    revision: str | None = None,
    stream: bool = False,
) -> Preview:
    """Say what `convert` would do, from headers alone: of a model on the Hub, no weights are fetched.

    Args:
        source: A directory, or a Hub id.
        target: Where it would be written; by default beside the source, or for a Hub id in the working directory. Only
            its disk's free space is looked at.
        to: See `convert`, as for the others.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`.
        revision: Branch, tag or commit of a Hub id.
        stream: Say what `convert` would do with it: it needs no space for a model in the Hub's cache.

    Raises:
        InputError, UsageError, StorageError: What `convert` would raise before it writes.
    """
    beside = Path.cwd() if is_hub_id(source) else Path(source).resolve()
    disk = beside if target is None else Path(target).resolve().parent
    if stream:
        require_hub_id(source)
    with open_headers(source, revision) as checkpoint:
        planned = make_plan(checkpoint, to=to, dtype=dtype, max_shard_size=max_shard_size)
        return Preview(
            source=Path(source),
            plan=planned,
            memory=plan_memory(planned, parse_size(max_memory)),
            source_tensors=len(checkpoint.tensors),
            source_bytes=checkpoint.total_bytes,
            space=measure_space(checkpoint, planned.target_bytes, disk, stream=stream),
            side_files=tuple(file.name for file in checkpoint.side_files),
            left_behind=checkpoint.left_behind,
            notes=cast_notes(planned),
        )


def make_plan(
    checkpoint: Checkpoint,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Plan:
    """Plan the conversion of an open checkpoint. Arguments are those of `convert`.

    Raises:
        UnsupportedCheckpointError, ConfigError: See `recognise`; or the config's sizes are not the tensors'.
        UnknownTensorError, DuplicateTensorError, TensorShapeError, IncompleteExpertsError: See `check_tensors`.
        UsageError: The source is in the layout `to` already; or an argument has no meaning.
    """
    sources, config = checkpoint.tensors, checkpoint.read_config()
    cast = None if dtype == "keep" else target_dtype(dtype)
    recognition = recognise(sources, config)
    if recognition.refusal is not None:
        raise recognition.refusal
    layout = recognition.layout
    assert layout is not None, "a checkpoint without a layout is refused"
    if to is not None and to not in list(Layout):
        raise UsageError("no such layout", expected=" or ".join(Layout), found=repr(to))
    if to == layout:
        raise UsageError(f"the source is in the {layout} layout already", hint=f"convert it with --to {layout.other}")
    parsed = check_tensors(sources.values(), layout, config)
    layer_scales = {name.owner: sources[own] for own, name in parsed.items() if name and name.rule is SCALE}
    experts = {own: sources[own].shape[0] for own, name in parsed.items() if name and name.rule is DOWN}
    folded = read_folded(checkpoint.path, experts) if layout is Layout.NEMO else {}
    tensors = {
        tensor.name: tensor
        for stored in sources.values()
        for tensor in _targets(stored, parsed[stored.name], layout, layer_scales, folded, cast)
    }
    _check_used_once(sources, tensors)
    ordered = dict(sorted(tensors.items(), key=lambda item: natural_key(item[0])))
    return Plan(
        source_layout=layout,
        spelling=recognition.spelling,
        target_layout=layout.other,
        tensors=ordered,
        files=layout_files(list(ordered.values()), parse_size(max_shard_size)),
        cast=cast,
        inexact=_inexact(ordered.values()),
    )


def natural_key(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts names as a person would: layers.2 before layers.10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name))


def target_dtype(name: str) -> DType:
    """Return the dtype that `--dtype` names.

    Raises:
        UsageError: It is none that an expert tensor may have.
    """
    for dtype in dtypes.EXPERT_DTYPES:
        if dtype.name == name:
            return dtype
    known = ", ".join(dtype.name for dtype in dtypes.EXPERT_DTYPES)
    raise UsageError("no dtype to convert to", expected=f"keep, {known}", found=repr(name))


def _targets(
    source: StoredTensor,
    name: MoEName | None,
    layout: Layout,
    layer_scales: Mapping[Owner, StoredTensor],
    folded: Mapping[str, Folded],
    dtype: DType | None,
) -> Iterable[PlannedTensor]:
    """Yield what one source tensor becomes in the other layout."""
    target_dtype = dtypes.cast_to(source.dtype, dtype)
    if name is None:
        yield PlannedTensor(source.name, target_dtype, source.shape, Operation.KEEP, source)
        return
    operation = name.rule.operation
    if operation is Operation.FOLD:
        return
    scale = layer_scales[name.owner] if scales(operation, layout) else None
    shape = converted_shape(operation, source.shape)
    said = folded.get(source.name)
    yield PlannedTensor(name.name(layout.other), target_dtype, shape, operation, source, scale, said)
    if name.rule is DOWN and layout is Layout.NEMO:
        yield PlannedTensor(name.sibling(SCALE).hf, target_dtype, source.shape[:1], Operation.FOLD, None)


def _check_used_once(sources: Mapping[str, StoredTensor], tensors: Mapping[str, PlannedTensor]) -> None:
    """Check the planner's own work: no source tensor is dropped, none is used twice."""
    used = Counter(
        stored.name for tensor in tensors.values() for stored in (tensor.source, tensor.scale) if stored is not None
    )
    wrong = {name: used[name] for name in sources.keys() | used.keys() if used[name] != 1}
    if wrong:
        raise AssertionError(f"source tensors not used exactly once: {wrong}")


def _inexact(tensors: Iterable[PlannedTensor]) -> dict[tuple[DType, DType], int]:
    casts = ((tensor.source.dtype, tensor.dtype) for tensor in tensors if tensor.source is not None)
    return dict(Counter(cast for cast in casts if not dtypes.is_exact(*cast)))


def layout_files(tensors: Sequence[PlannedTensor], max_shard_size: int) -> tuple[PlannedFile, ...]:
    """Spread tensors over files in their order, each file as full as `max_shard_size` allows."""
    groups: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if not groups or nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(tensor)
        room -= nbytes
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{number + 1:05}-of-{len(groups):05}.safetensors" for number in range(len(groups))]
    )
    files = []
    for name, group in zip(names, groups, strict=True):
        header, entries = layout_header([(t.name, t.dtype, t.shape) for t in group], {"format": "pt"})
        files.append(PlannedFile(name, header, entries, max(len(header), entries[-1].end)))
    return tuple(files)


def _nbytes(tensor: PlannedTensor) -> int:
    bits = tensor.dtype.bits
    for size in tensor.shape:
        bits *= size
    return bits // 8
