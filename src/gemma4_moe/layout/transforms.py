"""What each operation does to a tensor's shape, its axes and its bits, and what undoes it. Nothing here computes."""

from __future__ import annotations

from gemma4_moe.layout.dtypes import DType, is_exact
from gemma4_moe.layout.table import Layout, Operation, Rule

#: The operations that exchange the last two axes; each is its own inverse as far as shapes go.
_TRANSPOSING = frozenset({Operation.TRANSPOSE, Operation.TRANSPOSE_SCALE})


def transposes(operation: Operation) -> bool:
    """Say whether `operation` exchanges the last two axes."""
    return operation in _TRANSPOSING


def scales(operation: Operation, source: Layout) -> bool:
    """Say whether `operation`, starting from `source`, multiplies each expert by its scale."""
    return operation is Operation.TRANSPOSE_SCALE and source is Layout.HF


def converted_shape(operation: Operation, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on the other side of `operation`. [..., R, C] becomes [..., C, R] where axes are exchanged."""
    if not transposes(operation):
        return shape
    *leading, rows, columns = shape
    return (*leading, columns, rows)


def converted_axis(operation: Operation, axis: int, ndim: int) -> int:
    """Return where axis `axis` of an `ndim`-dimensional tensor lies on the other side of `operation`.

    A placement `Shard(axis)` becomes `Shard(converted_axis(...))`: no data crosses ranks.
    """
    if not transposes(operation) or axis < ndim - 2:
        return axis
    return 2 * ndim - 3 - axis


def shape_of(rule: Rule, layout: Layout, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of `rule`'s tensor in `layout` for given sizes of the axes E, H and I."""
    return tuple(sizes["I"] * 2 if axis == "2I" else sizes[axis] for axis in rule.axes(layout))


def folds_in_place_exactly(file: DType, model: DType) -> bool:
    """Say whether loading `file` values into `model` storage and scaling there rounds only once.

    The load itself rounds each value to the model's dtype before the scale multiplies. That is harmless only where
    every value of the file's dtype is a value of the model's.
    """
    return is_exact(file, model)
