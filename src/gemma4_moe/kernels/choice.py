"""The choice of a kernel: which are available, why others are not, and which one a caller or the environment names."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

from gemma4_moe.errors import UsageError

#: Takes the place of "auto" wherever the caller names no kernel.
ENVIRONMENT = "GEMMA4_MOE_KERNEL"

NAMES = ("auto", "cpu", "triton", "torch", "numpy")

_log = logging.getLogger("gemma4_moe")


class Availability(NamedTuple):
    """Whether a kernel can run in this process.

    Attributes:
        usable: Whether it can.
        detail: The instruction set or device that it would use, or the reason why it can't run.
    """

    usable: bool
    detail: str


def available() -> dict[str, Availability]:
    """Return each kernel's name with whether it can run here, and the reason."""
    return {"cpu": cpu(), "triton": triton(), "torch": _module("torch"), "numpy": Availability(True, "always there")}


def for_array(kernel: str, supported: bool) -> str:
    """Return "cpu" or "numpy" for a NumPy array.

    Args:
        kernel: The kernel that the caller asked for.
        supported: Whether the compiled kernels know the dtypes.

    Raises:
        UsageError: The kernel asked for is not available, or doesn't work on arrays.
    """
    asked = _asked(kernel)
    if asked == "triton":
        raise UsageError("the kernel can't work on this", expected="a CUDA tensor for triton", found="a NumPy array")
    if asked == "cpu":
        _require(asked, cpu())
    if asked in ("torch", "numpy") or not supported:
        return "numpy"
    return "cpu" if _extension_or_say_so() else "numpy"


def for_tensor(kernel: str, device: str, supported: bool) -> str:
    """Return "cpu", "triton" or "torch" for a tensor.

    Args:
        kernel: The kernel that the caller asked for.
        device: The device's type, e.g. "cuda".
        supported: Whether the compiled kernels know the dtypes and the kind of tensor.

    Raises:
        UsageError: The kernel asked for is not available, or doesn't work on that device.
    """
    asked = _asked(kernel)
    if device == "meta" or asked in ("torch", "numpy"):
        return "torch"
    if asked == "cpu":
        _require(asked, cpu())
    if asked == "triton":
        _require(asked, triton())
    serves = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if asked != "auto" and asked != serves and not (asked == "triton" and interpreted()):
        raise UsageError("the kernel can't work on this", expected=f"a tensor for {asked}", found=f"one on {device}")
    if not supported or serves is None:
        return "torch"
    if asked == "triton":
        return "triton"
    if serves == "cpu":
        return "cpu" if _extension_or_say_so() else "torch"
    return "triton" if triton().usable else "torch"


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


def no_result(dtype: object) -> UsageError:
    """Return the error for a product or a cast into a dtype that no kernel rounds to."""
    return UsageError(
        "no kernel rounds to this dtype",
        expected="bfloat16, float16 or float32",
        found=dtype,
        hint="take one of these dtypes, or leave both the scale and the dtype out: then bits are copied",
    )


def interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter, which works on CPU tensors and serves tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def allowed_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _asked(kernel: str) -> str:
    asked = os.environ.get(ENVIRONMENT, "auto") if kernel == "auto" else kernel
    if asked not in NAMES:
        raise UsageError("unknown kernel", expected=f"one of {', '.join(NAMES)}", found=repr(asked))
    return asked


def _require(name: str, found: Availability) -> None:
    if not found.usable:
        raise UsageError(
            f"the kernel {name} is not available",
            found=found.detail,
            hint='choose "auto", or see gemma4_moe.kernels.available()',
        )


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
