"""Move expert bytes: exchange the last two axes, multiply each expert by its scale in fp32, round once.

Rounding is to nearest even; subnormals, −0.0 and infinities are kept. Where the dtype stays and the scale is absent or
exactly one, bits are copied. Everywhere else a NaN becomes the target's quiet NaN with the sign of its element. Every
kernel gives the same bits: `choice` takes the fastest that is there.

No gradient flows through any of these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.errors import TensorShapeError
from gemma4_moe.kernels import arrays
from gemma4_moe.kernels.choice import Availability, available

if TYPE_CHECKING:
    import torch

__all__ = ["Availability", "available", "scale_add_cast", "scale_cast", "scale_in_place", "transpose_scale_cast"]


def transpose_scale_cast(
    x: Any, *, scale: Any = None, dtype: Any = None, out: Any = None, kernel: str = "auto", threads: int | None = None
) -> Any:
    """Return x [..., R, C] as [..., C, R], each x[e] times scale[e], in `dtype`.

    Args:
        x: A NumPy array or a torch tensor, bfloat16, float16 or float32; any strides.
        scale: [E] for x [E, ..., R, C], or None. The product is taken in fp32.
        dtype: Dtype of the result, NumPy's or torch's as x is; by default out's, or else x's own.
        out: Where to write [..., C, R]; any strides, but no memory of x. A new contiguous array by default.
        kernel: "auto" or the name of a kernel. The environment variable GEMMA4_MOE_KERNEL takes the place of "auto".
        threads: How many threads a kernel on the CPU uses; by default one for each core that the process may use.

    Raises:
        TensorShapeError: `scale` or `out` does not have the shape or the dtype that x asks for.
        UsageError: The kernel is not available, or can't work on x, or `dtype` is none that kernels round to.
    """
    if x.ndim < (2 if scale is None else 3):
        raise TensorShapeError("there are no two axes to exchange", expected="[..., R, C]", found=tuple(x.shape))
    return scale_cast(x.swapaxes(-1, -2), scale=scale, dtype=dtype, out=out, kernel=kernel, threads=threads)


def scale_cast(
    x: Any, *, scale: Any = None, dtype: Any = None, out: Any = None, kernel: str = "auto", threads: int | None = None
) -> Any:
    """Return x [E, ...] in the same layout, each x[e] times scale[e], in `dtype`.

    `out` may be x itself. Arguments and errors are those of `transpose_scale_cast`.
    """
    if isinstance(x, np.ndarray):
        return arrays.scale_cast(x, scale, dtype, out, kernel, threads)
    from gemma4_moe.kernels import tensors

    return tensors.scale_cast(x, scale, dtype, out, kernel, threads)


def scale_add_cast(
    x: arrays.Array,
    *,
    left: arrays.Array,
    right: arrays.Array,
    acts: arrays.Array,
    out: arrays.Array,
    scale: arrays.Array | None = None,
    kernel: str = "auto",
    threads: int | None = None,
) -> None:
    """Write x [E, R, C], each x[e] times scale[e], plus left[e] · right[e], to `out`: fp32, rounded once to its dtype.

    A sum over the rank goes from 0 up, without fused multiply-add, and is then added: every kernel gives the same bits.

    Args:
        x: A NumPy array, bfloat16, float16 or float32; any strides.
        left: fp32 [E, R, r]; the matrix of each expert is contiguous.
        right: fp32 [E, r, C], contiguous.
        acts: bool [E]: where it is false nothing is added, and x[e] is converted as `scale_cast` does it.
        out: Where to write [E, R, C]; any strides, but no memory of x.
        scale: [E], or None.
        kernel: As in `transpose_scale_cast`.
        threads: As in `transpose_scale_cast`.
    """
    arrays.scale_add_cast(x, scale, arrays.Addition(left, right, acts), out, kernel, threads)


def scale_in_place(
    x: torch.Tensor, scale: torch.Tensor, *, kernel: str = "auto", threads: int | None = None
) -> torch.Tensor:
    """Multiply each x[e] of x [E, ...] by scale[e] in place, with the same rounding, and return x.

    x may have any strides. Errors are those of `transpose_scale_cast`.
    """
    scale_cast(x, scale=scale, out=x, kernel=kernel, threads=threads)
    return x
