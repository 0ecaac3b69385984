"""What a conversion will do, from headers alone: each output tensor, where its bytes come from, and in which file.

Planning checks everything that names, shapes and the config can tell, so that a conversion that starts can only fail
for what the bytes or the disk hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.recognition import check_tensors, recognise
from gemma4_moe.converter.base import find_base
from gemma4_moe.errors import UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.dtypes import target_dtype
from gemma4_moe.layout.names import MoEName, lookup, natural_key
from gemma4_moe.layout.table import DOWN, SCALE, Layout, Operation, converted_shape, scales
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, PlannedFile, layout_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.converter.base import BaseExperts
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.inventory import Owner


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
        base: The base's experts, which its own may still be, or None.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    operation: Operation
    source: StoredTensor | None
    scale: StoredTensor | None = None
    base: BaseExperts | None = None


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


def make_plan(
    checkpoint: Checkpoint,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    base: Checkpoint | None = None,
) -> Plan:
    """Plan the conversion of an open checkpoint. Arguments are those of `convert`; the base is open too.

    Raises:
        UnsupportedCheckpointError, ConfigError: See `recognise`; or the config's sizes are not the tensors'.
        UnknownTensorError, DuplicateTensorError, TensorShapeError, IncompleteExpertsError: See `check_tensors`.
        UsageError: The source is in the layout `to` already; an argument has no meaning; or see `find_base`.
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
    tensors = {
        tensor.name: tensor
        for stored in sources.values()
        for tensor in _targets(stored, parsed[stored.name], layout, layer_scales, cast)
    }
    _check_used_once(sources, tensors)
    if base is not None:
        tensors |= _with_base(tensors, layout, base)
    ordered = dict(sorted(tensors.items(), key=lambda item: natural_key(item[0])))
    return Plan(
        source_layout=layout,
        spelling=recognition.spelling,
        target_layout=layout.other,
        tensors=ordered,
        files=layout_files([(t.name, t.dtype, t.shape) for t in ordered.values()], parse_size(max_shard_size)),
        cast=cast,
        inexact=_inexact(ordered.values()),
    )


def _targets(
    source: StoredTensor,
    name: MoEName | None,
    layout: Layout,
    layer_scales: Mapping[Owner, StoredTensor],
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
    yield PlannedTensor(name.name(layout.other), target_dtype, shape, operation, source, scale)
    if name.rule is DOWN and layout is Layout.NEMO:
        yield PlannedTensor(name.sibling(SCALE).hf, target_dtype, source.shape[:1], Operation.FOLD, None)


def _with_base(tensors: Mapping[str, PlannedTensor], layout: Layout, base: Checkpoint) -> dict[str, PlannedTensor]:
    """Return those tensors that a base has experts for, with them."""
    if layout is not Layout.NEMO:
        raise UsageError(
            "a base is for the way back, where scales are divided out",
            file=base.path,
            expected="a source in the nemo layout",
            found=f"a source in the {layout} layout",
            hint="leave --base out",
        )
    downs = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
        if (parsed := lookup(name, Layout.HF)) is not None and parsed.rule is DOWN
    }
    return {name: replace(tensors[name], base=experts) for name, experts in find_base(base, downs).items()}


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
