"""The per-expert scales of a plan: small, read before anything else, and kept as they are whatever they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.planning import Plan

    Scales = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def read_scales(plan: Plan) -> Scales:
    """Return the fp32 scale [E] that is folded into each target tensor, by the target's name."""
    scales = {}
    for tensor in plan.tensors.values():
        if tensor.scale is not None:
            raw = np.empty(tensor.scale.nbytes, np.uint8)
            tensor.scale.read_into(raw.data)
            scales[tensor.name] = raw.view(tensor.scale.dtype.numpy()).astype(np.float32)
    return scales


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
