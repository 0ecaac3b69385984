"""The per-expert scales of a plan, known before any block: those that are folded, and those that come back.

What is folded is read from the source, and kept as it is whatever it holds. What comes back is what `unfolding` finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.layouts import SCALE, Layout, lookup
from gemma4_moe.unfolding import Candidate, candidates, judge_experts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.coordination import Ranks
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


def unfold_scales(plan: Plan, ranks: Ranks, *, buffered: bool, threads: int) -> Scales:
    """Return the fp32 scale [E] that experts are written with on the way back, by the target's names.

    Each `down_proj` that the source's manifest knows is there, and its `per_expert_scale`: one, or what was folded into
    the expert where that and the weights give its bits again. Each rank looks at its part, on `threads` threads. All
    ranks must call.

    Raises:
        CheckpointFormatError, StorageError: What reading the source raises.
        ParallelError: Another rank failed.
    """
    experts = _candidates(plan)
    with ranks.together("look at the experts"):
        own = judge_experts(experts[ranks.rank :: ranks.world], buffered=buffered, threads=threads)
    scales: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for tensor in plan.tensors.values():
        name = lookup(tensor.name, Layout.HF)
        if tensor.folded is not None and name is not None:
            scales[tensor.name] = scales[name.sibling(SCALE).hf] = np.full(tensor.shape[0], 1, np.float32)
    for rank, same in enumerate(ranks.everyones(own)):
        for expert, is_same in zip(experts[rank :: ranks.world], same, strict=True):
            if is_same:
                scales[expert.name][expert.expert] = expert.scale
    return scales


def unfolded_experts(plan: Plan, scales: Scales) -> tuple[str, ...]:
    """Say how many experts were written with a scale that is not one; nothing where no manifest names one."""
    count = len(_candidates(plan))
    if not count or not scales:
        return ()
    written = sum(
        int(np.count_nonzero(scales[tensor.name] != 1)) for tensor in plan.tensors.values() if tensor.folded is not None
    )
    said = f"{written} of {count} experts with a scale in the source's manifest got it back, as both fold to their bits"
    return (said if written == count else f"{said}; the others have their own bits, and the scale one",)


def _candidates(plan: Plan) -> list[Candidate]:
    return [
        expert
        for tensor in plan.tensors.values()
        if tensor.folded is not None and tensor.source is not None
        for expert in candidates(tensor.name, tensor.source, tensor.folded, tensor.dtype)
    ]


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
