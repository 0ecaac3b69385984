"""Move expert bytes: exchange the last two axes, multiply each expert by its scale in fp32, round once.

Rounding is to nearest even; subnormals, −0.0 and infinities are kept. Where the dtype stays and the scale is absent or
exactly one, bits are copied. Everywhere else a NaN becomes the target's quiet NaN with the sign of its element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def transpose_scale_cast(x: Any, *, scale: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """Return x [..., R, C] as [..., C, R], each x[e] times scale[e], in `dtype`.

    Args:
        x: A NumPy array or a torch tensor, bfloat16, float16 or float32; any strides.
        scale: [E] for x [E, ..., R, C], or None. The product is taken in fp32.
        dtype: Dtype of the result, NumPy's or torch's as x is; x's own by default.
        out: Where to write [..., C, R]; any strides. A new contiguous array by default.

    Raises:
        ValueError: `scale` or `out` does not have the shape that x asks for.
    """
    if isinstance(x, np.ndarray):
        from gemma4_moe.kernels import numpy_kernel

        return numpy_kernel.scale_cast(x.swapaxes(-1, -2), scale, dtype, out)
    from gemma4_moe.kernels import torch_kernel

    return torch_kernel.scale_cast(x.transpose(-1, -2), scale, dtype, out)


def scale_cast(x: Any, *, scale: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """Return x [E, ...] in the same layout, each x[e] times scale[e], in `dtype`. Arguments as above."""
    if isinstance(x, np.ndarray):
        from gemma4_moe.kernels import numpy_kernel

        return numpy_kernel.scale_cast(x, scale, dtype, out)
    from gemma4_moe.kernels import torch_kernel

    return torch_kernel.scale_cast(x, scale, dtype, out)


def scale_in_place(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply each x[e] of x [E, ...] by scale[e] in place, with the same rounding, and return x."""
    from gemma4_moe.kernels import torch_kernel

    return torch_kernel.scale_cast(x, scale, None, x)
