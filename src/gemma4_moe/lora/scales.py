"""The scales of a base, by which B of `down` differs between a folded and an unfolded base.

Trained beside folded weights an expert computes s·W + Δ. On the unfolded base it computes s·(W + Δ'), so Δ' = Δ / s:
B is divided by s in fp32 and rounded once to its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.checkpoint.values import scales_of
from gemma4_moe.errors import InputError, TensorShapeError, UsageError
from gemma4_moe.hub.source import is_hub_id, open_source
from gemma4_moe.layout.names import MoEName, lookup
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.layout.names import LayerKey
    from gemma4_moe.lora.modules import Array

    #: A directory, a Hub id, or scales by their names in the hf layout.
    Base = str | Path | Mapping[str, Any]

_NAME_IT = "give base=, the published hf checkpoint that the model was trained from (command: --base)"


class Scales:
    """The `per_expert_scale` of each layer of a base."""

    def __init__(self, values: Mapping[LayerKey, Array], origin: str) -> None:
        self._values, self._origin = values, origin

    def of(self, layer: LayerKey, experts: int) -> Array:
        """Return the fp32 scale [E] of a layer.

        Raises:
            UsageError: The base has none for it.
            TensorShapeError: It is of another number of experts.
            InputError: A value is zero or not finite.
        """
        name = MoEName(*layer, SCALE).hf
        if layer not in self._values:
            found = ", ".join(sorted({f"{prefix}layers.*" for prefix, _ in self._values})) or "no scale"
            raise UsageError(
                "the base has no scale for a layer of the adapter",
                tensor=name,
                file=self._origin,
                found=found,
                hint="name the published hf checkpoint, of the same kind, that the adapter was trained on",
            )
        scale = self._values[layer]
        if scale.shape != (experts,):
            hint = "name the checkpoint that the adapter was trained on"
            raise TensorShapeError(
                "the base has another number of experts than the adapter",
                tensor=name,
                file=self._origin,
                expected=[experts],
                found=list(scale.shape),
                hint=hint,
            )
        wrong = np.flatnonzero((scale == 0) | ~np.isfinite(scale))
        if wrong.size:
            raise InputError(
                "a scale by which no adapter can be divided",
                tensor=name,
                file=self._origin,
                expected="finite values other than zero",
                found=f"{scale[wrong[0]]} for expert {wrong[0]}",
                hint="keep the adapter in the form in which it was trained, or adapt other weights than down",
            )
        return scale


def read_scales(base: Base | None) -> Scales:
    """Read all scales of a base; of a model on the Hub nothing else is fetched.

    Raises:
        UsageError: No base is given, or it has no scales.
        InputError, StorageError: As `open_source` raises them.
    """
    if base is None:
        raise UsageError(
            "the adapter changes down_proj, and the scales of its base are not known",
            expected="a base with a per_expert_scale for each layer",
            found="no base",
            hint=_NAME_IT,
        )
    if isinstance(base, Mapping):
        return _named({name: _array(value) for name, value in base.items()}, "the scales that were given")
    with open_source(base, stream=is_hub_id(base)) as checkpoint:
        return scales_in(checkpoint)


def scales_in(checkpoint: Checkpoint) -> Scales:
    """Read all scales of an open base. Raises a UsageError if it has none."""
    found = scales_of(checkpoint, Layout.HF)
    return _named({name: scale.astype(np.float32) for name, scale in found.items()}, str(checkpoint.path))


def _named(given: Mapping[str, Array], origin: str) -> Scales:
    """Return scales by their layers."""
    values: dict[LayerKey, Array] = {}
    for name, scale in given.items():
        parsed = lookup(name, Layout.HF)
        if parsed is None or parsed.rule is not SCALE:
            expected = MoEName("model.", 0, SCALE).hf
            hint = "give scales by their names in the hf layout"
            raise UsageError("not the name of a scale", tensor=name, expected=f"such as {expected}", hint=hint)
        values[parsed.layer_key] = scale
    if not values:
        raise UsageError("the base has no per_expert_scale", file=origin, hint=_NAME_IT)
    return Scales(values, origin)


def _array(value: Any) -> Array:
    """Return a scale in fp32, from any array or tensor that has `tolist`, or from numbers."""
    return np.array(value.tolist() if hasattr(value, "tolist") else value, np.float32)


def rescaled(plain: Array, scale: Array, *, to_folded: bool, name: str) -> Array:
    """Return B of `down` [E, H, r] for a folded base or for an unfolded one.

    The product, or the quotient, is taken in fp32 and rounded once to the dtype of B.

    Raises:
        InputError: A finite value becomes infinite.
    """
    factor = scale[:, None, None]
    values = plain.astype(np.float32)
    with np.errstate(over="ignore"):
        exact = values * factor if to_folded else values / factor
        result = exact.astype(plain.dtype)
    if not np.array_equal(np.isfinite(result.astype(np.float32)), np.isfinite(values)):
        problem = "a value of an adapter that becomes infinite with its expert's scale"
        hint = "save the adapter in float32 or bfloat16, and convert it again"
        raise InputError(problem, tensor=name, found=f"dtype {plain.dtype}", hint=hint)
    return result
