"""Convert a LoRA adapter between the forms of NeMo AutoModel, PEFT and vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.lora import LoraForm, ParamWrapper
from gemma4_moe.layout.names import fold_names
from gemma4_moe.layout.table import DOWN
from gemma4_moe.lora.changes import router_notes
from gemma4_moe.lora.documents import documents
from gemma4_moe.lora.forms import written
from gemma4_moe.lora.names import is_router
from gemma4_moe.lora.opening import open_adapter
from gemma4_moe.lora.scales import read_scales, rescaled
from gemma4_moe.lora.writing import write_adapter
from gemma4_moe.sizes import format_size
from gemma4_moe.target.preconditions import check_target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.lora.modules import Array, LoraModule
    from gemma4_moe.lora.opening import Adapter
    from gemma4_moe.lora.scales import Base, Scales


@dataclass(frozen=True, slots=True, repr=False)
class LoraConversion:
    """The result of `convert_lora`.

    Attributes:
        target: The directory that it made.
        source_form: The form of the source.
        form: The form of the target.
        modules: Number of adapted weights.
        tensors: Number of tensors of the target.
        nbytes: Size of its weights in bytes.
        notes: Sentences that a user should know of.
    """

    target: Path
    source_form: LoraForm
    form: LoraForm
    modules: int
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        size = f"{self.modules} weights, {self.tensors:,} tensors, {format_size(self.nbytes)}"
        return f"<LoraConversion {self.source_form} → {self.form}: {size}, {len(self.notes)} notes>"


def convert_lora(
    source: str | Path,
    target: str | Path,
    *,
    to: LoraForm | str,
    base: Base | None = None,
    legacy_layout: bool = False,
) -> LoraConversion:
    """Convert an adapter's directory into the new directory `target`.

    NeMo's form belongs to folded weights, PEFT's and vLLM's to unfolded ones: between them B of `down` is multiplied
    or divided by its expert's scale in fp32, and rounded once. All other values keep their bits.

    Args:
        source: A directory with adapter_model.safetensors and adapter_config.json.
        target: A directory that does not exist yet, or is empty.
        to: The form: "nemo", "peft" or "vllm".
        base: The published hf checkpoint that was trained from, whose scales are needed: a directory, a Hub id, or
            scales [E] by their names in the hf layout. Only for an adapter of `down`, between folded and unfolded.
        legacy_layout: Write the layout of PEFT before 0.19.1.

    Raises:
        InputError: The source is not an adapter that can be converted; nothing was written.
        UsageError: The target may not be written; an argument has no meaning; or the base is missing, or has no scale.
        StorageError: The disk or its permissions refused.
    """
    source, target = expanded(source), expanded(target)
    if to not in list(LoraForm):
        raise UsageError("no such form of an adapter", expected=" or ".join(LoraForm), found=repr(to))
    form, layout = LoraForm(to), ParamWrapper.LEGACY if legacy_layout else ParamWrapper.CURRENT
    check_target(target, source, overwrite=False)
    with open_adapter(source) as adapter:
        if (adapter.form, adapter.layout or layout) == (form, layout):
            hint = "use it as it is, or name another form"
            raise UsageError("the adapter is in this form already", file=source, found=str(form), hint=hint)
        crosses = adapter.form.is_folded is not form.is_folded
        scales = read_scales(base) if crosses and adapter.needs_scale else None
        made = documents(adapter, form, layout)
        groups = []
        for module in adapter.modules.values():
            factor = made.factors.get(module.name, 1.0)
            for side in module.sides:
                tensors = list(written(module, side, form, layout, adapter.modules))
                read = partial(_values, module, side, scales, factor=factor, to_folded=form.is_folded)
                groups.append((tensors, read))
        for module in adapter.modules.values():
            if scales is not None and module.rule is DOWN:
                _scale(module, scales)  # refused before anything is written
        notes = _notes(adapter, form, made.factors)
        options = {"from": str(adapter.form), "to": str(form), "source": adapter.file.header.digest}
        nbytes = write_adapter(target, groups, made.files, options, confirm=adapter.file.check_unchanged)
        tensors_made = sum(len(tensors) for tensors, _ in groups)
        return LoraConversion(target, adapter.form, form, len(adapter.modules), tensors_made, nbytes, notes)


def _scale(module: LoraModule, scales: Scales) -> Array:
    assert module.layer is not None, "experts are in a layer"
    return scales.of(module.layer, module.sides["B"].shape[0])


def _values(module: LoraModule, side: str, scales: Scales | None, *, factor: float, to_folded: bool) -> Array:
    """Return a side's values for the new form."""
    values = module.sides[side].read()
    if side == "A":
        return values
    if scales is not None and module.rule is DOWN:
        values = rescaled(values, _scale(module, scales), to_folded=to_folded, name=module.name)
    if factor != 1:
        values = (values.astype(np.float32) * np.float32(factor)).astype(values.dtype)
    return values


def _notes(adapter: Adapter, form: LoraForm, factors: Mapping[str, float]) -> tuple[str, ...]:
    routers = [module for module in adapter.modules.values() if is_router(module.name)]
    notes = [*router_notes([module.name for module in routers if np.any(module.sides["B"].read())])]
    if factors:
        notes.append(f"{', '.join(fold_names(factors))}: B has the ratio of scalings, since {form} has one for all")
    return tuple(notes)
