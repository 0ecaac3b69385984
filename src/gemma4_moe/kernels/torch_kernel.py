"""The kernel in torch, for tensors on any device, meta and wrapped ones included."""

from __future__ import annotations

import torch

#: Experts are taken in blocks of about this many elements, so that the fp32 product takes little memory.
_BLOCK_ELEMENTS = 1 << 24

_CODES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


def scale_cast(x: torch.Tensor, factors: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write x [E, ...] to out, each x[e] times factors[e] (fp32), or as it is.

    Raises nothing of its own: shapes are checked before.
    """
    if x.is_meta:
        return
    if factors is None and x.dtype == out.dtype:
        out.copy_(x)
        return
    if x.ndim == 0 or x.numel() <= _BLOCK_ELEMENTS:
        out.copy_(_converted(x, factors, out.dtype))
        return
    step = max(1, _BLOCK_ELEMENTS * x.shape[0] // x.numel())
    for first in range(0, x.shape[0], step):
        block = slice(first, first + step)
        out[block].copy_(_converted(x[block], None if factors is None else factors[block], out.dtype))


def _converted(x: torch.Tensor, factors: torch.Tensor | None, target: torch.dtype) -> torch.Tensor:
    factor = None if factors is None else factors.reshape(-1, *[1] * (x.ndim - 1))
    product = x.float() if factor is None else x.float() * factor
    result = product.to(target)
    _make_quiet(result, product.isnan(), x)
    return result if factor is None or x.dtype != target else torch.where(factor == 1, x, result)


def _make_quiet(result: torch.Tensor, nan: torch.Tensor, x: torch.Tensor) -> None:
    """Give each NaN of `result` the bits of the quiet NaN, with the sign of x. Torch's own casts vary in both."""
    quiet = _QUIET_NAN[result.dtype]
    negative = quiet - (1 << (8 * result.itemsize - 1))
    bits = result.view(_CODES[result.itemsize])
    codes = torch.where(x.view(_CODES[x.itemsize]) < 0, negative, quiet).to(bits.dtype)
    bits.copy_(torch.where(nan, codes, bits))
