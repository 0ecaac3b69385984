"""The base of a conversion to hf: an hf checkpoint whose experts the model may still hold, folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.recognition import checkpoint_targets, recognise
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.layout.targets import Source, Target


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """The experts of one layer of a base.

    Attributes:
        weights: Its `down_proj` [E, H, I], in whatever tensors it is stored.
        scale: Its `per_expert_scale` [E].
    """

    weights: Source[StoredTensor]
    scale: StoredTensor

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that these are."""
        return (*(part.stored for part in self.weights.parts), self.scale)


def find_base(base: Checkpoint, wanted: Mapping[str, Target[StoredTensor]]) -> dict[str, BaseExperts]:
    """Return the base's experts for each `down_proj` of a target, by its name.

    Args:
        base: The base, open.
        wanted: The `down_proj` tensors of the target, by name.

    Raises:
        UnsupportedCheckpointError, ConfigError: See `recognise`.
        UnknownTensorError, DuplicateTensorError, IncompleteExpertsError: See `checkpoint_targets`.
        UsageError: The base is in the nemo layout, lacks a layer, or has values that the target's dtype does not hold.
        TensorShapeError: A tensor has another shape than the target's; or see `checkpoint_targets`.
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
    experts = {
        target.name: BaseExperts(target.source, target.scale)
        for target in checkpoint_targets(base.tensors.values(), Layout.HF, config).values()
        if target.source is not None and target.scale is not None
    }
    found = {}
    for name, target in wanted.items():
        native = target.origin.name  # in the nemo layout, which has one name for a tensor whatever the base's spelling
        if native not in experts:
            raise UsageError(
                "the base lacks a layer of the model",
                tensor=name,
                file=base.path,
                hint="name the checkpoint that the model was made from, or leave --base out",
            )
        _check(experts[native], target)
        found[name] = experts[native]
    return found


def _check(experts: BaseExperts, target: Target[StoredTensor]) -> None:
    if experts.weights.shape != target.shape:
        raise TensorShapeError(
            "the base has another shape",
            tensor=target.name,
            file=experts.scale.file.path,
            expected=target.shape,
            found=experts.weights.shape,
            hint="name the checkpoint that the model was made from, or leave --base out",
        )
    for tensor in (experts.weights.parts[0].stored, experts.scale):
        if not dtypes.is_exact(tensor.dtype, target.dtype):
            raise UsageError(
                "the target's dtype does not hold the base's values",
                tensor=tensor.name,
                file=tensor.file.path,
                expected=f"{tensor.dtype.name}, or a dtype that holds it",
                found=target.dtype.name,
                hint=f"give --dtype {tensor.dtype.name}, or leave --base out",
            )
