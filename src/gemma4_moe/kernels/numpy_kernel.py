"""The kernel in NumPy. Every other one must give its bits; this one needs neither torch nor a compiler."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@np.errstate(over="ignore", invalid="ignore")  # Inf and NaN are values like others
def scale_cast(x: Array, factors: Array | None, out: Array) -> Array:
    """Write x [E, ...] to out, each x[e] times factors[e] (fp32), or as it is; return out."""
    if factors is None:
        if x.dtype == out.dtype:
            out[...] = x
        else:
            _round(x.astype(np.float32), x, out)
        return out
    for expert in range(x.shape[0]):  # one at a time: an fp32 copy of one expert is all the memory that it takes
        one, into = x[expert : expert + 1], out[expert : expert + 1]
        if factors[expert] == 1 and x.dtype == out.dtype:
            into[...] = one
        else:
            _round(one.astype(np.float32) * factors[expert], one, into)
    return out


def _round(product: Array, x: Array, out: Array) -> None:
    """Round fp32 to out's dtype; NaN becomes the quiet NaN with the sign of x."""
    out[...] = product
    nan = np.isnan(product)
    if nan.any():
        quiet = np.array(np.nan, np.float32).astype(out.dtype)
        out[nan] = np.where(np.signbit(x[nan].astype(np.float32)), -quiet, quiet)
