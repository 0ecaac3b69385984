"""An adapter merged into the weights of a conversion: which target gets which change, and the sum.

A value is scale · weight + change, in fp32, rounded once to the target's dtype. An expert whose change is zero is
converted as it is without an adapter, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gemma4_moe import kernels
from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError, command_line
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.names import fold_names, lookup
from gemma4_moe.layout.table import DOWN, Layout
from gemma4_moe.lora.changes import Change
from gemma4_moe.lora.scales import scales_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.targets import Read, Target
    from gemma4_moe.lora.changes import Factors
    from gemma4_moe.lora.modules import Array, LoraModule
    from gemma4_moe.lora.opening import Adapter
    from gemma4_moe.lora.scales import Scales


def find_changes(
    adapter: Adapter, checkpoint: Checkpoint, targets: Mapping[str, Target[StoredTensor]], source: Layout, to: Layout
) -> dict[str, Change]:
    """Return the change of each target that an adapter changes, by its name, after checking that they fit.

    Raises:
        UnknownTensorError: The adapter changes a weight that the checkpoint lacks.
        TensorShapeError: The weight has another shape, or a dtype that is not computed with.
        UsageError: The adapter is of another form than the folded weights, whose scales are not known.
    """
    folded = Layout.NEMO in (source, to)
    named = {_target_name(module, to): module for module in adapter.modules.values()}
    if unknown := [module for name, module in named.items() if name not in targets]:
        raise UnknownTensorError(
            "an adapter of a weight that the checkpoint lacks",
            tensor=unknown[0].sides["A"].name,
            file=adapter.file.path,
            expected="weights of the checkpoint",
            found=", ".join(fold_names(module.name for module in unknown)),
            hint=f"name the checkpoint that the adapter was trained from: {checkpoint.path} is another",
        )
    found = {}
    for name, module in named.items():
        _check(module, targets[name], source)
        fold = int(folded) - int(adapter.form.is_folded) if module.rule is DOWN else 0
        if fold and source is Layout.NEMO:
            raise _without_scales(adapter, module, checkpoint)
        exchanged = module.is_experts and source is Layout.NEMO
        found[name] = Change(module, adapter.scaling_of(module), fold, exchanged)
    return found


def _target_name(module: LoraModule, to: Layout) -> str:
    """Return the name in a layout of the weight that a module changes."""
    name = module.name if module.is_experts else f"{module.name}.weight"
    parsed = lookup(name, Layout.HF)
    return name if parsed is None else parsed.name(to)


def _check(module: LoraModule, target: Target[StoredTensor], source: Layout) -> None:
    a, b = (module.sides[side].shape for side in "AB")
    matrix = (a[-1], b[-2]) if module.is_experts and source is Layout.NEMO else (b[-2], a[-1])
    expected, stored = (*b[:-2], *matrix), target.source
    assert stored is not None, "a weight has a source"
    if stored.shape != expected or stored.dtype not in EXPERT_DTYPES:
        raise TensorShapeError(
            "an adapter that does not fit the weight which it changes",
            tensor=target.origin.name,
            file=target.origin.file.path,
            expected=f"{list(expected)} in {', '.join(dtype.name for dtype in EXPERT_DTYPES)}, as {module.name} has",
            found=f"{stored.dtype.name} {list(stored.shape)}",
            hint="name the checkpoint that the adapter was trained from",
        )


def _without_scales(adapter: Adapter, module: LoraModule, checkpoint: Checkpoint) -> UsageError:
    convert = command_line("gemma4-moe", "lora", adapter.path, f"{adapter.path.name}-nemo", "--to", "nemo")
    return UsageError(
        "an adapter of unfolded weights, and a base with folded ones, whose scales are not known",
        tensor=module.name,
        file=checkpoint.path,
        expected=f"the {Layout.HF} checkpoint as the base, or an adapter in {Layout.NEMO}'s form",
        found=f"a base in the {Layout.NEMO} layout, an adapter in {adapter.form}'s form",
        hint=f"name the published {Layout.HF} checkpoint as the base; or first: {convert} --base HF-CHECKPOINT",
    )


def with_rows(target: Target[StoredTensor]) -> Target[StoredTensor]:
    """Return a target that is changed, its blocks of whole rows."""
    source = target.source
    return target if source is None or source.row else replace(target, source=source.by_rows())


def scales_for(changes: Mapping[str, Change], checkpoint: Checkpoint) -> Scales | None:
    """Read the scales of an open source if a change needs them."""
    return scales_in(checkpoint) if any(change.fold for change in changes.values()) else None


class Merging:
    """Adds changes to stored values. Its methods are called by one thread at a time."""

    def __init__(self, changes: Mapping[str, Change], scales: Scales | None, threads: int) -> None:
        """Take the changes by the targets' names."""
        self.changes = changes
        self._scales, self._threads = scales, threads
        self._read: dict[str, Factors] = {}  # of the last two targets: blocks at their border may change places

    def merge(self, name: str, read: Read[StoredTensor], stored: Array, scale: Array | None, out: Array) -> None:
        """Write values of a read, each expert's times its scale, with their change to `out`, of the same shape."""
        left, right, acts = self._factors(name)
        if stored.ndim == 2:  # rows of a matrix
            stored, out, experts, rows = stored[None], out[None], slice(0, 1), slice(*read.experts)
        else:
            experts, rows = slice(*read.experts), slice(*read.rows)
        kernels.scale_add_cast(
            stored,
            left=left[experts, rows],
            right=right[experts],
            acts=acts[experts],
            scale=scale,
            out=out,
            threads=self._threads,
        )

    def _factors(self, name: str) -> Factors:
        if name not in self._read:
            while len(self._read) > 1:
                del self._read[next(iter(self._read))]
            self._read[name] = self.changes[name].read(self._scales)
        return self._read[name]
