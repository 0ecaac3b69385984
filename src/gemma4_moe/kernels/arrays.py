"""The work on NumPy arrays: check the arguments, choose the kernel, call it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

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


class Addition(NamedTuple):
    """What is added to each expert: left [E, R, r] times right [E, r, C], where acts [E] says so."""

    left: Array
    right: Array
    acts: Array


def scale_add_cast(
    x: Array, scale: Array | None, addition: Addition, out: Array, kernel: str, threads: int | None
) -> None:
    """Write x [E, R, C], each x[e] times scale[e], plus the addition, to `out`."""
    left, right, acts = addition
    factors = None if scale is None else np.ascontiguousarray(scale, np.float32)
    choice.check_arguments(x, factors, out, out.strides, out.dtype, rounds=x.dtype in _CODES and out.dtype in _CODES)
    experts, rows, columns = x.shape
    rank = right.shape[1]
    assert (left.shape, right.shape, acts.shape) == ((experts, rows, rank), (experts, rank, columns), (experts,))
    assert left.strides[1:] == (4 * rank, 4), "each expert's left matrix is contiguous"
    assert right.flags.c_contiguous, "the right matrices are contiguous"
    assert left.dtype == right.dtype == np.float32, "the matrices are fp32"
    assert acts.dtype == np.bool_, "a bool for each expert"
    if choice.for_array(kernel, x.dtype in _CODES and out.dtype in _CODES) == "numpy":
        numpy_kernel.scale_add_cast(x, factors, addition, out)
        return
    from gemma4_moe.kernels import _cpu

    _cpu.scale_add_cast(
        x.shape,
        x.ctypes.data,
        _CODES[x.dtype],
        x.strides,
        out.ctypes.data,
        _CODES[out.dtype],
        out.strides,
        0 if factors is None else factors.ctypes.data,
        left.ctypes.data,
        left.strides[0] // 4,
        right.ctypes.data,
        rank,
        np.ascontiguousarray(acts).ctypes.data,
        choice.allowed_cores() if threads is None else threads,
        "",
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skipped = -raw.ctypes.data % _ALIGNMENT
    return raw[skipped : skipped + nbytes].view(dtype).reshape(shape)
