"""Measures contenders in turn beside a plain copy, in rounds, on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemma4_moe import kernels

Contender = Callable[[int], Any]  # takes the number of the round, to rotate inputs by

#: The contenders that are slow and nothing depends on are measured in one round of so many.
EVERY = 4


class Measured(NamedTuple):
    """Seconds of each contender's rounds; and in each round, a copy's time over ours."""

    seconds: dict[str, list[float]]
    shares: list[float]

    def median(self, name: str) -> float:
        """Return the median of a contender's seconds."""
        return statistics.median(self.seconds[name])

    def summary(self) -> dict[str, Any]:
        """Return medians and quartiles: of seconds by contender, and of the share."""
        return {
            "seconds": {name: self.median(name) for name in self.seconds},
            "quartiles": {name: _quartiles(measured) for name, measured in self.seconds.items()},
            "share": statistics.median(self.shares),
            "share quartiles": _quartiles(self.shares),
        }


class Timer:
    """Runs contenders in turn, round after round, and times each."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds

    def __call__(self, copy: Contender, ours: Contender, **others: Contender) -> Measured:
        """Measure, after two rounds to warm up: a copy, ours, a copy again, and in some rounds the others."""
        seconds: dict[str, list[float]] = {name: [] for name in ("copy", "ours", *others)}
        for turn in range(-2, self.rounds):  # malloc keeps large blocks from the second on
            now = {}
            before = self._once(copy, turn)
            now["ours"] = self._once(ours, turn)
            now["copy"] = (before + self._once(copy, turn)) / 2
            if turn < 0 or turn % EVERY == 0:
                now |= {name: self._once(contender, turn) for name, contender in others.items()}
            if turn >= 0:
                for name, value in now.items():
                    seconds[name].append(value)
        return Measured(seconds, [a / b for a, b in zip(seconds["copy"], seconds["ours"], strict=True)])

    def _once(self, contender: Contender, turn: int) -> float:
        if self.device.type == "cpu":
            started = time.perf_counter()
            contender(turn)
            return time.perf_counter() - started
        # What runs before the first event hides the time that the host takes to launch what is timed.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        contender(turn)
        begin.record()
        for step in range(4):
            contender(4 * turn + step)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 4e3


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ordinary numbers; one expert's, repeated, since drawing them all takes longer than the benchmark."""
    return torch.randn(shape[1:], device=device).to(dtype).expand(shape).contiguous()


def copying(nbytes: int, device: torch.device) -> Contender:
    """Return a contender that copies nbytes / 2, so that nbytes cross the bus, between two buffers beyond any cache."""
    size = min(nbytes // 2, 1 << 29)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def copy(turn: int) -> None:
        for first in range(0, nbytes // 2, size):
            part = slice(0, min(size, nbytes // 2 - first))
            buffers[turn % 2][part].copy_(buffers[1 - turn % 2][part])

    return copy


def sets_that_fit(nbytes: int, device: torch.device) -> int:
    """Return 2, or 1 where two sets of inputs and outputs beside torch's intermediate results would fill the memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2 if 12 * nbytes < total else 1


def keep_memory() -> None:
    """Make glibc's malloc keep what is freed; other C libraries are left as they are."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def give_back_memory() -> None:
    """Give what `keep_memory` kept back to the system, so that a row starts without the holes of the row before."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
        name += f", {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "kernels": {name: found.detail for name, found in kernels.available().items()},
    }
