"""What a conversion will do, from headers alone: each target tensor, its sources, and its file.

Planning checks everything that names, shapes, dtypes and the config can tell. A conversion that has started can fail
only for the values and for the disk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from gemma4_moe.checkpoint.completeness import uncalled
from gemma4_moe.checkpoint.recognition import checkpoint_targets, recognise
from gemma4_moe.converter.base import find_base
from gemma4_moe.converter.merging import find_changes, with_rows
from gemma4_moe.errors import UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.dtypes import target_dtype
from gemma4_moe.layout.prefix_forms import DIFFUSION_TYPES, decoder_written
from gemma4_moe.layout.table import Layout
from gemma4_moe.sizes import format_size, parse_size
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, PlannedFile, layout_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.base import BaseExperts
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.targets import Target
    from gemma4_moe.lora.changes import Change
    from gemma4_moe.lora.opening import Adapter

    PlannedTensor: TypeAlias = Target[StoredTensor]


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """A conversion, ready to run.

    Attributes:
        tensors: The target's tensors by name.
        bases: The base's experts, by the name of the target's `down_proj` that may still hold them.
        changes: The changes of a merge, by the target's name.
        files: The target's weight files.
        cast: The dtype that all tensors are cast to that can be, or None.
        inexact: The number of tensors of each cast (source dtype, target dtype) that can change values.
        uncalled: Names of tensors, the same in both layouts, that config.json does not call for.
    """

    source_layout: Layout
    spelling: str
    target_layout: Layout
    tensors: Mapping[str, PlannedTensor]
    bases: Mapping[str, BaseExperts]
    changes: Mapping[str, Change]
    files: tuple[PlannedFile, ...]
    cast: DType | None
    inexact: Mapping[tuple[DType, DType], int]
    uncalled: tuple[str, ...]

    @property
    def target_bytes(self) -> int:
        """Size in bytes of all weight files of the target."""
        return sum(file.size for file in self.files)

    def __repr__(self) -> str:
        target = f"{self.target_layout}, {len(self.tensors):,} tensors, {len(self.files)} files"
        return f"<Plan {self.source_layout} ({self.spelling}) → {target}, {format_size(self.target_bytes)}>"


def make_plan(
    checkpoint: Checkpoint,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    base: Checkpoint | None = None,
    adapter: Adapter | None = None,
) -> Plan:
    """Plan the conversion of an open checkpoint. Arguments are those of `convert`; base and adapter are open too.

    Raises:
        InputError: See `recognise` and `targets_of`; the config's sizes are not the tensors'; a tensor is missing that
            it calls for; or see `find_changes`.
        UsageError: The source is in the layout `to` already; an argument has no meaning; or see `find_base`.
    """
    config = checkpoint.read_config()
    cast = None if dtype == "keep" else target_dtype(dtype)
    recognition = recognise(checkpoint.tensors, config)
    layout = recognition.accepted()
    target_layout = _target_layout(layout, to, base, may_keep=adapter is not None or checkpoint.in_parts)
    targets = checkpoint_targets(checkpoint.tensors.values(), layout, config, cast, complete=True, to=target_layout)
    is_merge = adapter is not None and layout is Layout.HF
    if target_layout is Layout.HF and not is_merge and config.model_type in DIFFUSION_TYPES:
        named = (replace(target, name=decoder_written(name)) for name, target in targets.items())
        targets = {target.name: target for target in named}
    changes = {} if adapter is None else find_changes(adapter, checkpoint, targets, layout, target_layout)
    targets |= {name: with_rows(targets[name]) for name in changes}
    casts = [(target.source.dtype, target.dtype) for target in targets.values() if target.source is not None]
    return Plan(
        source_layout=layout,
        spelling=recognition.spelling,
        target_layout=target_layout,
        tensors=targets,
        bases={} if base is None else find_base(base, targets),
        changes=changes,
        files=layout_files(
            [(t.name, t.dtype, t.shape) for t in targets.values()], parse_size(max_shard_size), target_layout
        ),
        cast=cast,
        inexact=Counter(cast for cast in casts if not dtypes.is_exact(*cast)),
        uncalled=tuple(uncalled(checkpoint.tensors, layout, config)),
    )


def _target_layout(layout: Layout, to: Layout | str | None, base: Checkpoint | None, *, may_keep: bool) -> Layout:
    """Return the layout of a target, after checking that a source of this layout is converted to it.

    A merge and a source in parts may keep the layout. So may an hf source whose experts are compared with a base's.
    """
    if to is not None and to not in list(Layout):
        raise UsageError("no such layout", expected=" or ".join(Layout), found=repr(to))
    target = (layout.other if base is None else Layout.HF) if to is None else Layout(to)
    if base is not None and target is not Layout.HF:
        raise UsageError(
            "a base is for the conversion to hf, where scales are taken out of the weights again",
            file=base.path,
            expected="hf as the target's layout",
            found=target,
            hint="leave --base out, or give --to hf",
        )
    if target is layout and base is None and not may_keep:
        raise UsageError(
            f"the source is in the {layout} layout already",
            expected=f"a source in the {layout.other} layout",
            found=f"a source in the {layout} layout",
            hint=f"it is {layout} already: use it as it is; or give --to {layout.other}",
        )
    return target
