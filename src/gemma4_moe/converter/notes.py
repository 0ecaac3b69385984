"""The notes of a conversion: names, scales and casts that a user should know of, folded over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.layout.names import fold_names
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.plan import Plan


def plan_notes(plan: Plan, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what index, headers and config tell: a wrong size, tensors that the config has not, then the plan's."""
    names = (change.module.name for change in plan.changes.values())
    changed = [f"the adapter changes {len(members)} {group}" for group, members in fold_names(names).items()]
    return (*index_notes(checkpoint), *uncalled_notes(plan.uncalled), *cast_notes(plan), *changed)


def index_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return that prefixes are read as others, weights dequantised, and that an index claims a wrong size."""
    forms = [] if checkpoint.prefix_form is None else [checkpoint.prefix_form.note]
    forms += [] if checkpoint.dequantised is None else [checkpoint.dequantised]
    if checkpoint.wrong_size is None:
        return tuple(forms)
    own = sum(entry.nbytes for file in checkpoint.files.values() for entry in file.header.entries)
    return (
        *forms,
        f"total_size in {INDEX_NAME} is {checkpoint.wrong_size:,}, and the tensors have {own:,} bytes",
    )


def uncalled_notes(names: Iterable[str]) -> tuple[str, ...]:
    """Return which tensors config.json does not call for."""
    return tuple(
        f"{len(members)} {'tensor' if len(members) == 1 else 'tensors'} {group}: config.json does not call for "
        f"{'it' if len(members) == 1 else 'them'}, and a model may not load {'it' if len(members) == 1 else 'them'}"
        for group, members in fold_names(names).items()
    )


def cast_notes(plan: Plan) -> tuple[str, ...]:
    """Return which casts round, and which tensors are not cast although a dtype was asked for."""
    notes = [f"{n} tensors are rounded from {old.name} to {new.name}" for (old, new), n in plan.inexact.items()]
    left: dict[str, list[str]] = {}
    for tensor in plan.tensors.values():
        if plan.cast is not None and tensor.dtype != plan.cast:
            left.setdefault(tensor.dtype.name, []).append(tensor.name)
    for dtype, all_names in left.items():
        for group, names in fold_names(all_names).items():
            keep = f"tensor {group} keeps" if len(names) == 1 else f"tensors {group} keep"
            notes.append(f"{len(names)} {keep} {dtype}: --dtype casts no such tensors")
    return tuple(notes)


def overflow_notes(plan: Plan, counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return how many finite values have become infinite; `counts` are the manifest's, by the tensors' names."""
    notes = []
    for group, names in fold_names(counts).items():
        count = sum(counts[name] for name in names)
        values = "finite value" if count == 1 else "finite values"
        notes.append(f"{count:,} {values} of {group} became infinite: {plan.tensors[names[0]].dtype.name} ends before")
    return tuple(notes)


def base_notes(plan: Plan, given_back: Mapping[str, int]) -> tuple[str, ...]:
    """Return how many experts are the base's, or that all scales are one; nothing on the way to nemo.

    `given_back` are the manifest's counts, by the tensors' names.
    """
    if (plan.source_layout, plan.target_layout) != (Layout.NEMO, Layout.HF):
        return ()
    if not plan.bases:
        return (
            "every per_expert_scale is one, and the weights keep the scale that was folded into them; "
            "give --base SRC, the hf checkpoint that the model was made from, to get its scales back exactly",
        )
    own, count = sum(given_back.values()), sum(base.weights.shape[0] for base in plan.bases.values())
    said = f"{own} of {count} experts are the base's, folded, and got its weights and scale"
    return (said if own == count else f"{said}; the others have their own bits, and the scale one",)
