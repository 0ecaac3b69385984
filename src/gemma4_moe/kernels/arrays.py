"""The work on NumPy arrays: check the arguments, choose the kernel, call it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from gemma4_moe.kernels import choice, numpy_kernel
from gemma4_moe.layout.dtypes import BFLOAT16, FLOAT16, FLOAT32

Array = np.ndarray[Any, np.dtype[Any]]

#: Results that we allocate begin at a multiple of this many bytes: whole lines can then be written past the caches.
_ALIGNMENT = 64

#: The compiled kernels' numbers for the dtypes that they read and write.
_CODES = {dtype.numpy(): code for code, dtype in enumerate((BFLOAT16, FLOAT16, FLOAT32))}


def scale_cast(x: Array, scale: Any, dtype: Any, out: Array | None, kernel: str, threads: int | None) -> Array:
    """Return x [E, ...], each x[e] times scale[e], in `dtype`, written to `out` if it is given."""
    target = np.dtype(dtype) if dtype is not None else (x.dtype if out is None else out.dtype)
    out = _aligned(x.shape, target) if out is None else out
    factors = None if scale is None else np.ascontiguousarray(scale, np.float32)
    strides = out.strides if out.flags.writeable else None
    choice.check_arguments(x, factors, out, strides, target, rounds=target in _CODES)
    if choice.for_array(kernel, x.dtype in _CODES and target in _CODES) == "numpy":
        return numpy_kernel.scale_cast(x, factors, out)
    from gemma4_moe.kernels import _cpu

    _cpu.scale_cast(
        x.shape,
        x.ctypes.data,
        _CODES[x.dtype],
        x.strides,
        out.ctypes.data,
        _CODES[target],
        out.strides,
        0 if factors is None else factors.ctypes.data,
        choice.allowed_cores() if threads is None else threads,
        "",
    )
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skipped = -raw.ctypes.data % _ALIGNMENT
    return raw[skipped : skipped + nbytes].view(dtype).reshape(shape)
