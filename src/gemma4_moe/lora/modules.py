"""An adapter as plain tensors, whatever its form: each module with its rank, its alpha, and its A and B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.lora import Axes
    from gemma4_moe.layout.names import LayerKey
    from gemma4_moe.layout.table import Rule

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """A or B of a module: [r, in] or [out, r] of a linear module, [E, r, in] or [E, out, r] of experts.

    Attributes:
        name: The name of the stored tensor, or of the first one.
        read: Returns the values.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One weight that an adapter changes.

    Attributes:
        name: The name of the linear module or of the experts' tensor, in the hf layout.
        rank: The rank r of its matrices.
        alpha: With the rank, it gives the scaling.
        sides: Its A and its B.
        layer: The key of its layer, for experts and router.
        rule: Its row of the table, for experts and router.
    """

    name: str
    rank: int
    alpha: float
    sides: Mapping[str, LoraTensor]
    layer: LayerKey | None = None
    rule: Rule | None = None

    @property
    def is_experts(self) -> bool:
        """Whether it is a weight of experts, with matrices for each."""
        return self.rule is not None and self.rule.is_matrices


def plain_from(stored: Array, stored_axes: Axes, axes: tuple[str, ...], sizes: Mapping[str, int]) -> Array:
    """Return a stored tensor as a view with the plain axes."""
    flat = [axis for group in stored_axes for axis in group]
    return stored.reshape([sizes[axis] for axis in flat]).transpose([flat.index(axis) for axis in axes])


def stored_from(plain: Array, axes: tuple[str, ...], stored_axes: Axes) -> Array:
    """Return a plain tensor with the axes of a form: the inverse of `plain_from`, in new memory."""
    flat = [axis for group in stored_axes for axis in group]
    moved = plain.transpose([axes.index(axis) for axis in flat])
    result = np.empty(moved.shape, plain.dtype)
    result[...] = moved
    return result.reshape(shape_in(plain.shape, axes, stored_axes))


def shape_in(shape: tuple[int, ...], axes: tuple[str, ...], stored_axes: Axes) -> tuple[int, ...]:
    """Return the shape that a plain shape has with the axes of a form."""
    sizes = dict(zip(axes, shape, strict=True))
    return tuple(int(np.prod([sizes[axis] for axis in group])) for group in stored_axes)
