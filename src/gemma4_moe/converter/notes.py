"""The notes of a conversion: scales and casts that a user should know of, folded over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.layout.names import fold_names
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.scales import Scales


def cast_notes(plan: Plan) -> tuple[str, ...]:
    """Return which casts round, and which tensors are not cast although a dtype was asked for."""
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
    """Return how many finite values have become infinite; `counts` are the manifest's, by the tensors' names."""
    said = []
    for group, names in fold_names(counts).items():
        count = sum(counts[name] for name in names)
        values = "finite value" if count == 1 else "finite values"
        said.append(f"{count:,} {values} of {group} became infinite: {plan.tensors[names[0]].dtype.name} ends before")
    return tuple(said)


def base_notes(plan: Plan, given_back: Mapping[str, int]) -> tuple[str, ...]:
    """Return how many experts are the base's, or that all scales are one; nothing on the way to nemo.

    Args:
        plan: The conversion that was done.
        given_back: How many experts of each tensor are the base's, from the manifest.
    """
    if plan.target_layout is not Layout.HF:
        return ()
    count = sum(tensor.shape[0] for tensor in plan.tensors.values() if tensor.base is not None)
    if not count:
        return (
            "every per_expert_scale is one, and the weights keep the scale that was folded into them; "
            "give --base SRC, the hf checkpoint that the model was made from, to get its scales back exactly",
        )
    own = sum(given_back.values())
    said = f"{own} of {count} experts are the base's, folded, and got its weights and scale"
    return (said if own == count else f"{said}; the others have their own bits, and the scale one",)


def unusual_scales(scales: Scales) -> tuple[str, ...]:
    """Return which scales are zero, negative or not finite, one sentence for each tensor."""
    found = []
    for name, stored in scales.items():
        scale = stored.astype(np.float32)
        kinds = {
            "NaN": np.isnan(scale),
            "infinite": np.isinf(scale),
            "zero": scale == 0,
            "negative": (scale < 0) & np.isfinite(scale),
        }
        said = [f"{int(mask.sum())} {kind}" for kind, mask in kinds.items() if mask.any()]
        if said:
            found.append(
                f"{name}: per_expert_scale has {' and '.join(said)} of {scale.size} values, folded as they are"
            )
    return tuple(found)
