"""The reference in torch, for tensors on any device, meta included."""

from __future__ import annotations

import torch


def scale_cast(
    x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype | None, out: torch.Tensor | None
) -> torch.Tensor:
    """Return x [E, ...], each x[e] times scale[e], in `dtype`, written to `out` if it is given."""
    target = dtype or (x.dtype if out is None else out.dtype)
    if out is None:
        out = torch.empty(x.shape, dtype=target, device=x.device)
    if out.shape != x.shape or out.dtype != target:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, but the result is {target} {tuple(x.shape)}")
    if scale is not None and scale.shape != x.shape[:1]:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, but there are {tuple(x.shape[:1])} experts")
    if scale is None and x.dtype == target:
        return out.copy_(x)
    product = x.float()
    factor = None if scale is None else scale.float().reshape(-1, *[1] * (x.ndim - 1))
    if factor is not None:
        product = product * factor
    if target == torch.float8_e4m3fn:
        product = product.clamp(-448, 448)
    quiet = torch.copysign(torch.tensor(float("nan"), device=x.device), x.float())
    result = torch.where(product.isnan(), quiet, product).to(target)
    if factor is not None and x.dtype == target:
        result = torch.where(factor == 1, x, result)
    return out.copy_(result)
