"""The choice of a kernel: which are available, why others are not, and which one a caller or the environment names.

Here are also the checks of arguments that hold for arrays and tensors alike.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_moe.errors import TensorShapeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Takes the place of "auto" wherever the caller names no kernel.
ENVIRONMENT = "GEMMA4_MOE_KERNEL"

NAMES = ("auto", "cpu", "triton", "torch", "numpy")

_log = logging.getLogger("gemma4_moe")


class Availability(NamedTuple):
    """Whether a kernel can run here; its instruction set or device, or why not."""

    usable: bool
    detail: str


def available() -> dict[str, Availability]:
    """Return each kernel's name with whether it can run here, and the reason."""
    return {"cpu": cpu(), "triton": triton(), "torch": _module("torch"), "numpy": Availability(True, "always there")}


def check_arguments(
    x: Any, factors: Any, out: Any, strides: Sequence[int] | None, target: Any, *, rounds: bool
) -> None:
    """Check that factors and `out` fit a product of x [E, ...] in `target`.

    `strides` are those of `out`, None if it can't be written. `rounds` tells whether kernels round to `target`.
    """
    if out.shape != x.shape or out.dtype != target:
        expected, found = f"{target} {tuple(x.shape)}", f"{out.dtype} {tuple(out.shape)}"
        raise TensorShapeError("out does not fit the result", expected=expected, found=found)
    if strides is None or any(stride == 0 and size > 1 for stride, size in zip(strides, out.shape, strict=True)):
        raise TensorShapeError("out can't be written", expected="writable memory, each element its own")
    if factors is not None and factors.shape != x.shape[:1]:
        raise TensorShapeError("one scale an expert is needed", expected=tuple(x.shape[:1]), found=tuple(factors.shape))
    if not rounds and (factors is not None or target != x.dtype):
        raise UsageError(
            "no kernel rounds to this dtype",
            expected="bfloat16, float16 or float32",
            found=target,
            hint="take one of these dtypes, or leave both the scale and the dtype out: then bits are copied",
        )


def for_array(kernel: str, supported: bool) -> str:
    """Return "cpu" or "numpy" for a NumPy array, given whether compiled kernels know the dtypes."""
    asked = _asked(kernel)
    if asked == "triton":
        raise UsageError("the kernel can't work on this", expected="a CUDA tensor for triton", found="a NumPy array")
    if asked == "cpu":
        _require(asked)
    return "cpu" if asked in ("auto", "cpu") and supported and _extension_or_say_so() else "numpy"


def for_tensor(kernel: str, device: str, supported: bool) -> str:
    """Return "cpu", "triton" or "torch", given whether compiled kernels know dtypes and class."""
    asked = _asked(kernel)
    if device == "meta" or asked in ("torch", "numpy"):
        return "torch"
    if asked != "auto":
        _require(asked)
    serves = "triton" if asked == "triton" and interpreted() else {"cpu": "cpu", "cuda": "triton"}.get(device)
    if asked not in ("auto", serves):
        raise UsageError("the kernel can't work on this", expected=f"a tensor for {asked}", found=f"one on {device}")
    if not supported or serves is None:
        return "torch"
    usable = _extension_or_say_so() if serves == "cpu" else triton().usable
    return serves if usable else "torch"


@cache
def cpu() -> Availability:
    """Return whether the compiled extension is there."""
    try:
        from gemma4_moe.kernels import _cpu
    except ImportError as error:
        return Availability(False, f"the extension module is missing: {error}")
    return Availability(True, f"{_cpu.instruction_sets()[0]}, {allowed_cores()} threads")


@cache
def triton() -> Availability:
    """Return whether Triton and a device for it are there."""
    for name in ("torch", "triton"):
        found = _module(name)
        if not found.usable:
            return found
    import torch

    if interpreted():
        return Availability(True, "Triton's interpreter, on the CPU")
    if not torch.cuda.is_available():
        return Availability(False, "there is no CUDA device")
    return Availability(True, torch.cuda.get_device_name())


def interpreted() -> bool:
    """Return whether Triton runs in its interpreter, which works on CPU tensors and serves tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def allowed_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _asked(kernel: str) -> str:
    asked = os.environ.get(ENVIRONMENT, "auto") if kernel == "auto" else kernel
    if asked not in NAMES:
        raise UsageError("unknown kernel", expected=f"one of {', '.join(NAMES)}", found=repr(asked))
    return asked


def _require(name: str) -> None:
    found = cpu() if name == "cpu" else triton()
    if not found.usable:
        hint = 'choose "auto", or see gemma4_moe.kernels.available()'
        raise UsageError(f"the kernel {name} is not available", found=found.detail, hint=hint)


@cache
def _module(name: str) -> Availability:
    found = importlib.util.find_spec(name) is not None
    return Availability(found, "installed" if found else f"{name} is not installed")


@cache
def _extension_or_say_so() -> bool:
    """Return whether the extension is there; if not, log it, once in a process."""
    found = cpu()
    if not found.usable:
        _log.warning("slow conversion: %s; reinstall with a C++ compiler", found.detail)
    return found.usable
