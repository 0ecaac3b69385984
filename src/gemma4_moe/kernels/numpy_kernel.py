"""The reference in NumPy: what every other kernel must equal, and what runs where neither torch nor a compiler is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def scale_cast(x: Array, scale: Array | None, dtype: Any, out: Array | None) -> Array:
    """Return x [E, ...], each x[e] times scale[e], in `dtype`, written to `out` if it is given."""
    target = np.dtype(dtype) if dtype is not None else (x.dtype if out is None else out.dtype)
    if out is None:
        out = np.empty(x.shape, target)
    if out.shape != x.shape or out.dtype != target:
        raise ValueError(f"out is {out.dtype} {out.shape}, but the result is {target} {x.shape}")
    if scale is None:
        _cast(x, out)
        return out
    if scale.shape != x.shape[:1]:
        raise ValueError(f"scale has shape {scale.shape}, but there are {x.shape[:1]} experts")
    for expert, factor in enumerate(scale.astype(np.float32)):
        if factor == 1:
            _cast(x[expert], out[expert])
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                product = x[expert].astype(np.float32) * factor
            _round(product, x[expert], out[expert])
    return out


def _cast(x: Array, out: Array) -> None:
    if x.dtype == out.dtype:
        out[...] = x
    else:
        _round(x.astype(np.float32), x, out)


def _round(product: Array, x: Array, out: Array) -> None:
    """Round fp32 to out's dtype; NaN becomes the quiet NaN with the sign of x."""
    if out.dtype == ml_dtypes.float8_e4m3fn:
        product = np.clip(product, -448, 448)
    with np.errstate(over="ignore"):
        out[...] = product
    nan = np.isnan(product)
    if nan.any():
        quiet = np.array(np.nan, np.float32).astype(out.dtype)
        out[nan] = np.where(np.signbit(x[nan].astype(np.float32)), -quiet, quiet)
