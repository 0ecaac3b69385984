"""The work on torch tensors: check the arguments, choose the kernel, call it."""

from __future__ import annotations

import torch

from gemma4_moe.kernels import choice, torch_kernel

#: The compiled kernels' numbers for the dtypes that they read and write.
_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

#: Only these have nothing but memory behind them. Other subclasses go through torch's own operations.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def scale_cast(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype | None,
    out: torch.Tensor | None,
    kernel: str,
    threads: int | None,
) -> torch.Tensor:
    """Return x [E, ...], each x[e] times scale[e], in `dtype`, written to `out` if it is given."""
    target = dtype or (x.dtype if out is None else out.dtype)
    x, fresh = x.detach(), out is None
    out = torch.empty(x.shape, dtype=target, device=x.device) if out is None else out
    factors = None if scale is None else scale.detach().to(x.device, torch.float32).contiguous()
    choice.check_arguments(x, factors, out, out.stride(), target, rounds=target in _CODES)
    plain = type(x) in _PLAIN and type(out) in _PLAIN and x.layout == out.layout == torch.strided
    supported = plain and x.device == out.device and x.dtype in _CODES and target in _CODES
    chosen = choice.for_tensor(kernel, x.device.type, supported)
    if chosen == "triton":
        from gemma4_moe.kernels import triton_kernel

        triton_kernel.scale_cast(x, factors, out.detach())
    elif chosen == "cpu":
        from gemma4_moe.kernels import _cpu

        if fresh:
            _cpu.advise_large_pages(out.data_ptr(), out.nbytes)  # NumPy does so for its arrays by itself
        _cpu.scale_cast(
            x.shape,
            x.data_ptr(),
            _CODES[x.dtype],
            [stride * x.itemsize for stride in x.stride()],
            out.data_ptr(),
            _CODES[target],
            [stride * out.itemsize for stride in out.stride()],
            0 if factors is None else factors.data_ptr(),
            choice.allowed_cores() if threads is None else threads,
            "",
        )
    else:
        torch_kernel.scale_cast(x, factors, out.detach())
    return out
