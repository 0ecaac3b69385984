"""The per-expert scales of a conversion: those that are folded, read before any block, and those that came back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.checkpoint.directory import StoredTensor
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.converter.plan import Plan

    Scales = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def read_scales(plan: Plan) -> Scales:
    """Return the fp32 scale [E] that is folded into each target tensor, by the target's name, whatever it holds."""
    return {tensor.name: read_scale(tensor.scale) for tensor in plan.tensors.values() if tensor.scale is not None}


def read_scale(stored: StoredTensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a `per_expert_scale` [E] as fp32. Raises what reading the file raises."""
    raw = np.empty(stored.nbytes, np.uint8)
    stored.read_into(raw.data)
    return raw.view(stored.dtype.numpy()).astype(np.float32)


def written_scales(plan: Plan, target: Path) -> Scales:
    """Return the fp32 scale [E] that experts were written with, from the files of `target`, by the scales' names.

    Only those of layers that have a base.

    Raises:
        CheckpointFormatError, StorageError: What reading the target raises.
    """
    known = {
        name.sibling(SCALE).hf
        for tensor in plan.tensors.values()
        if tensor.base is not None and (name := lookup(tensor.name, Layout.HF)) is not None
    }
    scales: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for planned in plan.files:
        wanted = [entry for entry in planned.entries if entry.name in known]
        if wanted:
            with SafetensorsFile(target / planned.name) as file:
                scales |= {entry.name: read_scale(StoredTensor(entry, file)) for entry in wanted}
    return scales


def unfolded_experts(plan: Plan, scales: Scales) -> tuple[str, ...]:
    """Return how many experts got the base's scale, or that all scales are one; nothing on the way to nemo.

    Args:
        plan: The conversion that was done.
        scales: The scales that `written_scales` returned.
    """
    if plan.target_layout is not Layout.HF:
        return ()
    count = sum(tensor.shape[0] for tensor in plan.tensors.values() if tensor.base is not None)
    if not count:
        return (
            "every per_expert_scale is one, and the weights keep the scale that was folded into them; "
            "give --base SRC, the hf checkpoint that the model was made from, to get its scales back exactly",
        )
    written = sum(int(np.count_nonzero(scale != 1)) for scale in scales.values())
    said = f"{written} of {count} experts got the base's own weights and a scale that is not one"
    return (said if written == count else f"{said}; the others have their own bits, or the base's with the scale one",)


def unusual_scales(scales: Scales) -> tuple[str, ...]:
    """Say which scales are zero, negative or not finite, one sentence for each tensor."""
    found = []
    for name, scale in scales.items():
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
