"""The base of a model on its way back: an hf checkpoint whose experts the model may still hold, folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.recognition import check_tensors, recognise
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.table import DOWN, SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.layout.dtypes import DType


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """The experts of one layer of a base.

    Attributes:
        weights: Its `down_proj` [E, H, I].
        scale: Its `per_expert_scale` [E].
    """

    weights: StoredTensor
    scale: StoredTensor


def find_base(base: Checkpoint, wanted: Mapping[str, tuple[tuple[int, ...], DType]]) -> dict[str, BaseExperts]:
    """Return the experts of a base for each `down_proj` of a target, by the name that both have in current spelling.

    Args:
        base: The base, open.
        wanted: Shape [E, H, I] and dtype of each `down_proj`, by its name.

    Raises:
        UnsupportedCheckpointError, ConfigError: See `recognise`.
        UnknownTensorError, DuplicateTensorError, IncompleteExpertsError: See `check_tensors`.
        UsageError: The base is in the nemo layout, lacks a layer, or has values that the target's dtype does not hold.
        TensorShapeError: A tensor has another shape than the target's; or see `check_tensors`.
    """
    config = base.read_config()
    recognition = recognise(base.tensors, config)
    if recognition.refusal is not None:
        raise recognition.refusal
    if recognition.layout is not Layout.HF:
        raise UsageError(
            "the base is in the wrong layout",
            file=base.path,
            expected=f"the {Layout.HF} layout",
            found=f"the {recognition.layout} layout",
            hint="name the published checkpoint that the model was made from",
        )
    parsed = check_tensors(base.tensors.values(), Layout.HF, config)
    stored = {name.hf: base.tensors[own] for own, name in parsed.items() if name and name.rule in (DOWN, SCALE)}
    scales = {name.hf: name.sibling(SCALE).hf for name in parsed.values() if name and name.rule is DOWN}
    found = {}
    for name, (shape, dtype) in wanted.items():
        if name not in scales:
            raise UsageError(
                "the base lacks a layer of the model",
                tensor=name,
                file=base.path,
                hint="name the checkpoint that the model was made from, or leave --base out",
            )
        experts = BaseExperts(stored[name], stored[scales[name]])
        _check(experts, name, shape, dtype)
        found[name] = experts
    return found


def _check(experts: BaseExperts, name: str, shape: tuple[int, ...], dtype: DType) -> None:
    if experts.weights.shape != shape:
        raise TensorShapeError(
            "the base has another shape",
            tensor=name,
            file=experts.weights.file.path,
            expected=shape,
            found=experts.weights.shape,
            hint="name the checkpoint that the model was made from, or leave --base out",
        )
    for tensor in (experts.weights, experts.scale):
        if not dtypes.is_exact(tensor.dtype, dtype):
            raise UsageError(
                "the target's dtype does not hold the base's values",
                tensor=tensor.name,
                file=tensor.file.path,
                expected=f"{tensor.dtype.name}, or a dtype that holds it",
                found=dtype.name,
                hint=f"give --dtype {tensor.dtype.name}, or leave --base out",
            )
