"""The verifier's own arithmetic: the bits of each element of a converted checkpoint.

It shares nothing with the kernels that it judges. A product of two fp32 numbers has at most 48 significant bits, so
fp64 holds it exactly, and the cast from fp64 to fp32 is the one rounding of the product. From fp32 to 16 bits the bits
are rounded as integers. Elements are passed as unsigned integers of their own width, never as numbers, so that NaNs and
zeros of either sign keep their bits.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from gemma4_moe.layout.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32, DType

#: Elements as unsigned integers.
Bits = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_QUIET_NAN = {BFLOAT16: 0x7FC0, FLOAT16: 0x7E00, FLOAT32: 0x7FC00000}

#: 2⁻¹⁴ as fp32, the smallest normal number of fp16.
_SMALLEST_NORMAL_FP16 = 0x38800000


def element_bits(dtype: DType) -> np.dtype[Any]:
    """Return the unsigned integers in which elements of `dtype` are compared; packed dtypes are compared in bytes."""
    return np.dtype(f"u{max(1, dtype.itemsize)}")


def widen(bits: Bits, dtype: DType) -> Floats:
    """Return elements of a floating-point dtype as fp64, which holds each of their values."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if dtype == BFLOAT16:
            narrow = (bits.astype(np.uint32) << 16).view(np.float32)
        elif dtype == FLOAT8_E4M3:
            narrow = bits.view(ml_dtypes.float8_e4m3fn)
        else:
            narrow = bits.view(f"f{dtype.itemsize}")
        return narrow.astype(np.float64)


def reference(bits: Bits, source: DType, target: DType, scale: float = 1.0) -> Bits:
    """Return elements of dtype `source`, of any shape, times `scale`, a number that fp32 holds, in dtype `target`.

    The product is rounded to fp32, then to the target, each to nearest even. If the dtype stays and the scale is
    exactly one, the elements keep their own bits. In all other cases a NaN becomes the target's quiet NaN with the sign
    bit of its element. The target is bfloat16, float16 or float32.
    """
    if source == target and scale == 1:
        return bits
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = (widen(bits, source) * scale).astype(np.float32)
    rounded = _round(product.view(np.uint32), target)
    nan = np.isnan(product)
    if nan.any():
        sign = (bits[nan] >> (source.bits - 1)).astype(rounded.dtype)
        rounded[nan] = (sign << (target.bits - 1)) | rounded.dtype.type(_QUIET_NAN[target])
    return rounded


def _round(fp32: Bits, target: DType) -> Bits:
    """Round fp32, not NaN, to `target`: to nearest, ties to even, overflow to infinity."""
    if target == FLOAT32:
        return fp32
    if target == BFLOAT16:
        return _drop(fp32, 16).astype(np.uint16)
    magnitude = fp32 & 0x7FFFFFFF
    # fp16's exponents begin 112 steps above fp32's. A magnitude above its largest becomes its infinity.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        normal = np.minimum(_drop(magnitude - (112 << 23), 13), 0x7C00)
        subnormal = np.rint(magnitude.view(np.float32) * np.float32(2**24)).astype(np.uint32)
    rounded = np.where(magnitude < _SMALLEST_NORMAL_FP16, subnormal, normal)
    float16: Bits = (rounded | (fp32 >> 16 & 0x8000)).astype(np.uint16)
    return float16


def _drop(bits: Bits, count: int) -> Bits:
    """Return `bits` without their lowest `count`, rounded to nearest even; a carry enters the exponent."""
    kept: Bits = (bits + ((1 << count - 1) - 1 + (bits >> count & 1))) >> count
    return kept
