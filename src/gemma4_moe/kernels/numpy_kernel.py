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


@np.errstate(over="ignore", invalid="ignore")
def scale_add_cast(x: Array, factors: Array | None, addition: tuple[Array, Array, Array], out: Array) -> None:
    """Write x [E, R, C], each x[e] times factors[e] (fp32), plus left[e] · right[e] where acts[e], to out."""
    for expert, (left, right, acts) in enumerate(zip(*addition, strict=True)):
        own = slice(expert, expert + 1)
        factor = None if factors is None else factors[own]
        if not acts:
            scale_cast(x[own], factor, out[own])
            continue
        total = np.zeros(x.shape[1:], np.float32)
        for column, row in zip(left.T, right, strict=True):  # term after term: another order has other bits
            total += column[:, None] * row
        values = x[expert].astype(np.float32) * (1 if factor is None else factor)
        scale_cast(values + total, None, out[expert])


def _round(product: Array, x: Array, out: Array) -> None:
    """Round fp32 to out's dtype; NaN becomes the quiet NaN with the sign of x."""
    out[...] = product
    nan = np.isnan(product)
    if nan.any():
        quiet = np.array(np.nan, np.float32).astype(out.dtype)
        out[nan] = np.where(np.signbit(x[nan].astype(np.float32)), -quiet, quiet)
