"""Every kernel that can run here, called alike on NumPy arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch

from gemma4_moe.kernels import _cpu, numpy_kernel, torch_kernel

Array = np.ndarray[Any, np.dtype[Any]]
Kernel = Callable[[Array, "Array | None", Array], object]

CODES = {np.dtype(ml_dtypes.bfloat16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}


def run_cpu(x, factors, out, *, instruction_set="", threads=1):
    _cpu.scale_cast(
        x.shape,
        x.ctypes.data,
        CODES[x.dtype],
        x.strides,
        out.ctypes.data,
        CODES[out.dtype],
        out.strides,
        0 if factors is None else factors.ctypes.data,
        threads,
        instruction_set,
    )


def tensor(x):
    """A contiguous copy of x. torch knows ml_dtypes by their bits only."""
    return torch.from_numpy(x.copy().view(f"i{x.itemsize}")).view(getattr(torch, str(x.dtype)))


def run_torch(x, factors, out):
    result = torch.empty(out.shape, dtype=getattr(torch, str(out.dtype)))
    torch_kernel.scale_cast(tensor(x), None if factors is None else torch.from_numpy(factors), result)
    out[...] = result.view(getattr(torch, f"int{8 * out.itemsize}")).numpy().view(out.dtype)


KERNELS = {
    "numpy": numpy_kernel.scale_cast,
    "torch": run_torch,
    **{name: partial(run_cpu, instruction_set=name) for name in _cpu.instruction_sets()},
}
