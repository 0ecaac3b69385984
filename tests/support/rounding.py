"""Correct rounding by a formula of its own: exact products in fp64, `rint` on multiples of the target's last place."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Format(NamedTuple):
    """precision: significant bits; min_exponent: of the smallest normal number; largest: finite value."""

    precision: int
    min_exponent: int
    largest: float
    quiet_nan: int


BF16, FP16, FP32 = (np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))
FORMATS = {
    BF16: Format(8, -126, (2 - 2**-7) * 2.0**127, 0x7FC0),
    FP16: Format(11, -14, 65504.0, 0x7E00),
    FP32: Format(24, -126, (2 - 2**-23) * 2.0**127, 0x7FC00000),
}

#: Factors that reach every corner: exact and inexact ones, both signs, overflow, underflow, zero, Inf, NaN, one.
FACTORS = np.array(
    [1.37, 1.0, -1.0, 0.73, -2.5, 0.0, -0.0, 1e-3, 3.1e4, 1e-38, 1.1e-41, -7e30, 3.3e38, np.inf, -np.inf, np.nan, 0.5],
    np.float32,
)


def codes(x):
    """The bits of x as unsigned integers."""
    return x.view(f"u{x.dtype.itemsize}")


@np.errstate(all="ignore")
def rounded(values, dtype):
    """Round fp64 values to nearest even in `dtype`'s precision and range; still fp64."""
    format_ = FORMATS[dtype]
    _, exponent = np.frexp(values)
    last_place = np.maximum(exponent, format_.min_exponent + 1) - format_.precision
    result = np.ldexp(np.rint(np.ldexp(values, -last_place)), last_place)
    return np.where(np.abs(result) > format_.largest, np.copysign(np.inf, values), result)


@np.errstate(all="ignore")
def expected(x, factors, dtype):
    """x [E, ...] times factors [E]: the product rounded to fp32, that to `dtype`; same layout as x."""
    if factors is None and x.dtype == dtype:
        return x.copy()
    wide = x.astype(np.float64)
    shape = (-1, *[1] * (x.ndim - 1))
    factor = np.array(1.0) if factors is None else factors.astype(np.float64).reshape(shape)
    product = rounded(wide * factor, FP32)
    nan = np.isnan(product)
    result = rounded(np.where(nan, 0.0, product), dtype).astype(np.float32).astype(dtype)
    sign = np.signbit(wide)
    quiet = FORMATS[dtype].quiet_nan
    bits = codes(result)
    bits[nan] = np.where(sign[nan], quiet | 1 << 8 * dtype.itemsize - 1, quiet)
    return np.where(factor == 1, x, result) if x.dtype == dtype else result


def random_codes(rng, shape, dtype):
    """Every kind of number: half of them any bits at all, half of ordinary magnitude."""
    wild = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    tame = rng.standard_normal(shape).astype(np.float32).astype(dtype)
    return np.where(rng.random(shape) < 0.5, wild, tame)


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    different = codes(np.ascontiguousarray(found)) != codes(np.ascontiguousarray(wanted))
    assert not different.any(), (
        f"{different.sum()} of {different.size} differ, first at {np.argwhere(different)[0]}: "
        f"{found[different][0]} instead of {wanted[different][0]}"
    )
