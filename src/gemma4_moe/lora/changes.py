"""The change that an adapter makes to each weight: scaling · B · A, ready to be added to a stored tensor.

Between folded and unfolded weights B of `down` is multiplied or divided by its expert's scale. All of it is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.errors import InputError
from gemma4_moe.layout.names import fold_names, layer_of
from gemma4_moe.lora.names import is_router

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from gemma4_moe.lora.modules import Array, LoraModule
    from gemma4_moe.lora.scales import Scales


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one weight.

    Attributes:
        module: The adapter's module.
        scaling: The factor of B · A.
        fold: 1 if B is multiplied by its expert's scale, -1 if it is divided, else 0.
        exchanged: Whether the tensor that is changed has the axes [E, in, out].
    """

    module: LoraModule
    scaling: float
    fold: int = 0
    exchanged: bool = False

    @property
    def nbytes(self) -> int:
        """The most bytes that two sets of its factors take, and the reading of one."""
        sides = self.module.sides.values()
        return sum(3 * 4 * prod(side.shape) for side in sides)

    def read(self, scales: Scales | None) -> Factors:
        """Read the adapter's matrices; `scales` are needed if `fold` is not 0.

        B is multiplied by one fp32 number for each expert: the scaling, times or over the expert's scale.

        Raises:
            InputError, UsageError, TensorShapeError: As `Scales.of` raises them.
        """
        a, b = (side if side.ndim == 3 else side[None] for side in (self.module.sides[s].read() for s in "AB"))
        factors = np.full(len(b), self.scaling)
        if self.fold:
            assert scales is not None, "a fold has scales"
            assert self.module.layer is not None, "experts are in a layer"
            factors = factors * scales.of(self.module.layer, len(b)).astype(np.float64) ** self.fold
        widened = kernels.transpose_scale_cast if self.exchanged else kernels.scale_cast
        with np.errstate(over="ignore"):
            both = widened(a, dtype=np.float32), widened(b, scale=factors.astype(np.float32), dtype=np.float32)
        acts: Array = np.logical_and(*(side.any(axis=(1, 2)) for side in both))
        left, right = both if self.exchanged else both[::-1]
        return Factors(left, right, acts)


class Factors(NamedTuple):
    """Two matrices whose product is the change of a stored tensor, for each expert; a linear module counts as one.

    Attributes:
        left: fp32 [E, R, r].
        right: fp32 [E, r, C].
        acts: Whether each expert's change is not zero.
    """

    left: Array
    right: Array
    acts: Array

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole change, from the factors' Gram matrices: |L·R|² = ⟨LᵀL, R·Rᵀ⟩."""
        grams = [
            np.matmul(*pair)
            for pair in ((self.left.swapaxes(1, 2), self.left), (self.right, self.right.swapaxes(1, 2)))
        ]
        return float(np.sqrt(max(0.0, np.vdot(*(gram.astype(np.float64) for gram in grams)))))


def router_notes(moved: Collection[str]) -> tuple[str, ...]:
    """Return what NeMo and PEFT do with the adapters of these routers, whose B is not zero."""
    if not moved:
        return ()
    return (
        f"{', '.join(fold_names(moved))}: NeMo's gate does not apply the LoRA of its projection, and PEFT does; B "
        "is not zero, so the two give different logits",
    )


def change_notes(changes: Iterable[Change], scales: Scales | None) -> tuple[str, ...]:
    """Return the norm of the change of each layer, and the experts that an adapter does not change.

    All of the adapter is read.

    Raises:
        InputError: A value is not finite, in the adapter or with its expert's scale; or see `Change.read`.
        UsageError, TensorShapeError: See `Change.read`.
    """
    squares: dict[str, float] = {}
    still, routers = [], []
    for change in changes:
        factors, name = change.read(scales), change.module.name
        if not (np.isfinite(factors.left).all() and np.isfinite(factors.right).all()):
            hint = "train the adapter again from an earlier step, or merge another one"
            found = "NaN or infinity, in A or in B with its scaling and its expert's scale"
            raise InputError("a change that is not finite", tensor=name, found=found, hint=hint)
        key = layer_of(name)
        group = "outside layers" if key is None else f"{key[0]}layers.{key[1]}"
        squares[group] = squares.get(group, 0.0) + factors.norm**2
        if is_router(name) and factors.acts.all():
            routers.append(name)
        if not factors.acts.all():
            numbers = np.flatnonzero(~factors.acts).tolist()
            experts = (
                f"expert{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of "
                if change.module.is_experts
                else ""
            )
            still.append(f"{experts}{name}: the adapter changes nothing, its A or its B is zero")
    norms = ", ".join(f"{group} {square**0.5:.3g}" for group, square in squares.items())
    return (f"norm of the change: {norms}", *router_notes(routers), *still)
