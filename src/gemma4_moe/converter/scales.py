"""The per-expert scales of a conversion: those that are folded, and those that a base gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.converter.plan import Plan, PlannedTensor
    from gemma4_moe.target.pieces import Piece

    Scales = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def read_scales(plan: Plan) -> Scales:
    """Return the scale [E] that is folded into each target tensor, by the target's name, with the source's bits."""
    return {tensor.name: read_scale(tensor.scale) for tensor in plan.tensors.values() if tensor.scale is not None}


def read_scale(stored: StoredTensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a `per_expert_scale` [E] with its own bits. Raises what reading the file raises."""
    raw = np.empty(stored.nbytes, np.uint8)
    stored.read_into(raw.data)
    return raw.view(stored.dtype.numpy())


def scales_with_base(plan: Plan) -> dict[str, PlannedTensor]:
    """Return the `down_proj` of each `per_expert_scale` that is known only when all its experts are judged."""
    return {
        name.sibling(SCALE).hf: tensor
        for tensor in plan.tensors.values()
        if tensor.base is not None and (name := lookup(tensor.name, Layout.HF)) is not None
    }


def given_back_scales(plan: Plan, pieces: Iterable[Piece]) -> Scales:
    """Return the fp32 scale [E] of each layer with a base: the base's for experts that are its own, else one.

    Args:
        plan: The plan.
        pieces: The pieces of all experts, of all ranks and runs.

    Raises:
        CheckpointFormatError, StorageError: What reading the base raises.
    """
    given_back: dict[str, list[int]] = {}
    for piece in pieces:
        if "given_back" in piece.facts:
            given_back.setdefault(piece.facts["tensor"], []).extend(piece.facts["given_back"])
    scales = {}
    for name, tensor in scales_with_base(plan).items():
        assert tensor.base is not None, "only those have a base"
        scales[name] = np.ones(tensor.shape[:1], np.float32)
        own = given_back.get(tensor.name, [])
        scales[name][own] = read_scale(tensor.base.scale).astype(np.float32)[own]
    return scales
