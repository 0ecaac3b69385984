"""The work on NumPy arrays: check the arguments, choose the kernel, call it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from gemma4_moe.errors import TensorShapeError
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
    out = _aligned(x.shape, target) if out is None else _checked(out, x.shape, target)
    factors = None if scale is None else np.ascontiguousarray(scale, np.float32)
    if factors is not None and factors.shape != x.shape[:1]:
        raise TensorShapeError("one scale an expert is needed", expected=x.shape[:1], found=factors.shape)
    if target not in _CODES and (factors is not None or target != x.dtype):
        raise choice.no_result(target)
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


def _checked(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if out.shape != shape or out.dtype != dtype:
        raise TensorShapeError(
            "out does not fit the result", expected=f"{dtype} {shape}", found=f"{out.dtype} {out.shape}"
        )
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(out.strides, shape, strict=True))
    if overlaps or not out.flags.writeable:
        raise TensorShapeError("out can't be written", expected="writable memory, each element its own")
    return out
