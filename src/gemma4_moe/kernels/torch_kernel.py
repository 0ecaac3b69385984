"""The kernel in torch, for tensors on any device, meta and wrapped ones included."""

from __future__ import annotations

import torch

#: Experts are taken in blocks of about this many elements, so that the fp32 product takes little memory.
_BLOCK_ELEMENTS = 1 << 24

_CODES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


def scale_cast(x: torch.Tensor, factors: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write x [E, ...] to out, each x[e] times factors[e] (fp32), or as it is."""
    if x.is_meta:
        return
    if factors is None and x.dtype == out.dtype:
        out.copy_(x)
        return
    if x.ndim == 0:
        x, out = x[None], out[None]
    step = max(1, _BLOCK_ELEMENTS * x.shape[0] // max(1, x.numel()))
    for first in range(0, x.shape[0], step):
        block = slice(first, first + step)
        out[block].copy_(_converted(x[block], None if factors is None else factors[block], out.dtype))


def _converted(x: torch.Tensor, factors: torch.Tensor | None, target: torch.dtype) -> torch.Tensor:
    factor = None if factors is None else factors.reshape(-1, *[1] * (x.ndim - 1))
    product = x.float() if factor is None else x.float() * factor
    result = product.to(target)
    # Each NaN gets the bits of the quiet NaN, with the sign of x. Torch's own casts vary in both.
    quiet, bits = _QUIET_NAN[target], result.view(_CODES[target.itemsize])
    codes = torch.where(x.view(_CODES[x.itemsize]) < 0, quiet - (1 << (8 * target.itemsize - 1)), quiet)
    bits.copy_(torch.where(product.isnan(), codes.to(bits.dtype), bits))
    return result if factor is None or x.dtype != target else torch.where(factor == 1, x, result)
