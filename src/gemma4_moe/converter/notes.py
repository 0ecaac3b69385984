"""What a user should know of a cast, one sentence for all tensors whose names differ in numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.layout.names import fold_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.converter.plan import Plan


def cast_notes(plan: Plan) -> tuple[str, ...]:
    """Say which casts round, and which tensors are not cast although a dtype was asked for."""
    rounded = [f"{n} tensors are rounded from {old.name} to {new.name}" for (old, new), n in plan.inexact.items()]
    left: dict[str, list[str]] = {}
    for tensor in plan.tensors.values():
        if plan.cast is not None and tensor.dtype != plan.cast:
            left.setdefault(tensor.dtype.name, []).append(tensor.name)
    kept = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {group} {'keeps' if len(names) == 1 else 'keep'} "
        f"{dtype}: --dtype casts no such tensors"
        for dtype, all_names in left.items()
        for group, names in fold_names(all_names).items()
    ]
    return (*rounded, *kept)


def overflow_notes(plan: Plan, counts: Mapping[str, int]) -> tuple[str, ...]:
    """Say how many finite values have become infinite; `counts` are those of the manifest, by the tensors' names."""
    said = []
    for group, names in fold_names(counts).items():
        count = sum(counts[name] for name in names)
        values = "finite value" if count == 1 else "finite values"
        said.append(f"{count:,} {values} of {group} became infinite: {plan.tensors[names[0]].dtype.name} ends before")
    return tuple(said)
