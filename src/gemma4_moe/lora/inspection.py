"""The inspection of an adapter: its form, its ranks and scalings, and the weights that it changes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.layout.names import fold_names
from gemma4_moe.lora.changes import Change, change_notes
from gemma4_moe.lora.opening import open_adapter
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.layout.lora import LoraForm, ParamWrapper


class ModuleFold(NamedTuple):
    """Changed weights whose names differ in numbers only.

    Attributes:
        name: In the hf layout; each number is replaced by the set of its values.
        rank: The rank r.
        scaling: The factor of B · A.
        dtype: The dtype of B.
        shape: The shape of the change: [out, in], or [E, out, in] of experts.
        weights: How many there are.
    """

    name: str
    rank: int
    scaling: float
    dtype: str
    shape: tuple[int, ...]
    weights: int


@dataclass(frozen=True, slots=True, repr=False)
class LoraInspection:
    """The result of `inspect_adapter`.

    Attributes:
        source: The directory.
        form: Its form.
        layout: The layout of PEFT's wrapper, for PEFT's form with experts.
        tensors: Number of tensors.
        bytes: Size of its weights in bytes.
        experts: Number of experts, or None if it adapts none.
        needs_scale: Whether it changes `down`, so that a change of form or a merge needs the scales of its base.
        folds: The weights that it changes.
        notes: With values, the norm of each layer's change and the weights that don't change.
    """

    source: Path
    form: LoraForm
    layout: ParamWrapper | None
    tensors: int
    bytes: int
    experts: int | None
    needs_scale: bool
    folds: tuple[ModuleFold, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        size = f"{self.tensors:,} tensors, {format_size(self.bytes)}"
        return f"<LoraInspection of {self.source}: {self.form}, {size}>"


def inspect_adapter(source: str | Path, *, values: bool = False) -> LoraInspection:
    """Return what an adapter's directory holds, by default without reading a value.

    Args:
        source: A directory with adapter_model.safetensors and adapter_config.json.
        values: Read all tensors, and note the norm of each layer's change, beside weights of the adapter's own form.

    Raises:
        InputError: It is not an adapter that is read; or with `values`, a change is not finite.
    """
    with open_adapter(expanded(source)) as adapter:
        groups: defaultdict[tuple[int, float, str, tuple[int, ...]], list[str]] = defaultdict(list)
        changes = []
        for module in adapter.modules.values():
            a, b = (module.sides[side] for side in "AB")
            factor = adapter.scaling_of(module)
            groups[module.rank, factor, b.dtype.name, (*b.shape[:-1], a.shape[-1])].append(module.name)
            changes.append(Change(module, factor))
        folds = [
            ModuleFold(name, rank, factor, dtype, shape, len(members))
            for (rank, factor, dtype, shape), names in groups.items()
            for name, members in fold_names(names).items()
        ]
        entries = adapter.file.header.entries
        return LoraInspection(
            source=adapter.path,
            form=adapter.form,
            layout=adapter.layout,
            tensors=len(entries),
            bytes=sum(entry.nbytes for entry in entries),
            experts=adapter.experts,
            needs_scale=adapter.needs_scale,
            folds=tuple(folds),
            notes=change_notes(changes, None) if values else (),
        )
