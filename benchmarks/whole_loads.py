"""A whole checkpoint into one process, page cache warm and cold: ours beside safetensors with both adapters, and reads.

    python benchmarks/whole_loads.py DIRECTORY [--layers 4] [--device cuda] [--repeats 5] [--json FILE]

DIRECTORY is on the disk to be measured; a checkpoint of 1.5 GB a layer is written into it and removed. The peer's way
is safetensors' `load_file` to the device and nemo-automodel 0.7.0's `from_hf`; without that package it is left out. On
a CPU safetensors maps files and reads nothing, so only a GPU compares like with like. Beside them are reads of all
bytes into memory, by one thread and by sixteen. Contenders alternate, after a round to warm up; seconds are medians
with the least and the most. Every result of ours is compared with torch's transposes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loading import forget
from real_layers import E, H, I, write_source
from safetensors.torch import load_file
from timing import machine

from gemma4_moe import Gemma4MoEStateDictAdapter, load_hf
from gemma4_moe.adapter import MoEConfig
from refit import peers_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 32 * 2**20


def read_all(directory: Path, threads: int) -> None:
    """Read all files by ranges into one buffer for each thread."""

    def work(ranges: list[tuple[int, int, int]]) -> None:
        buffer = bytearray(_READ_BYTES)
        for descriptor, start, size in ranges:
            os.preadv(descriptor, [memoryview(buffer)[:size]], start)

    files = [path.open("rb") for path in sorted(directory.glob("*.safetensors"))]
    ranges = [
        (file.fileno(), start, min(_READ_BYTES, size - start))
        for file in files
        for size in [os.fstat(file.fileno()).st_size]
        for start in range(0, size, _READ_BYTES)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [ranges[number::threads] for number in range(threads)]))
    for file in files:
        file.close()


def whole_state(directory: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Load all files with safetensors."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path, device=str(device))
    return state


def check(model: dict[str, torch.Tensor], directory: Path, device: torch.device) -> int:
    """Compare every bit of a loaded model with torch's own arithmetic; return how many tensors there are."""
    hf = whole_state(directory, device)
    for name, tensor in model.items():
        prefix, _, rest = name.partition("moe.")
        if rest == "experts.gate_and_up_projs":
            expected = hf[f"{prefix}experts.gate_up_proj"].transpose(1, 2)
        elif rest == "experts.down_projs":
            scale = hf[f"{prefix}router.per_expert_scale"].float()[:, None, None]
            expected = (hf[f"{prefix}experts.down_proj"].transpose(1, 2).float() * scale).to(tensor.dtype)
        else:
            expected = hf[name.replace("moe.gate.", "router.")]
        assert torch.equal(tensor, expected), name
    return len(model)


def measure(
    contenders: dict[str, Callable[[], Any]], source: Path, device: torch.device, repeats: int, *, cold: bool
) -> dict[str, list[float]]:
    """Return each contender's seconds, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, repeats):
        for name, contender in contenders.items():
            if cold:
                forget(source)
            start = time.perf_counter()
            result = contender()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
            del result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    source = options.directory / "whole-loads-benchmark"
    write_source(source, options.layers)
    ours = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, dtype=torch.bfloat16)
    peer = peers_adapter(E, torch.bfloat16)
    try:
        model = ours.from_hf(whole_state(source, device))
        for tensor in model.values():
            tensor.fill_(3.0)
        nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        load_hf(model, source)
        equal = check(model, source, device)
        contenders: dict[str, Callable[[], Any]] = {
            "reads, 1 thread": lambda: read_all(source, 1),
            "reads, 16 threads": lambda: read_all(source, 16),
            "ours, load_hf": lambda: load_hf(model, source),
            "safetensors, ours": lambda: ours.from_hf(whole_state(source, device)),
        }
        if peer is not None:
            contenders["safetensors, nemo-automodel 0.7.0"] = lambda: peer.from_hf(whole_state(source, device))
        about: dict[str, Any] = machine(device)
        print("; ".join(f"{key}: {value}" for key, value in about.items()))
        print(f"{nbytes / 1e9:.2f} GB in {options.layers} layers; {equal} tensors equal\n")
        print("| page cache | | s | min–max | GB/s |\n|---|---|--:|--:|--:|")
        for cache in ("warm", "cold"):
            rows = about[cache] = measure(contenders, source, device, options.repeats, cold=cache == "cold")
            for name, seconds in rows.items():
                median = statistics.median(seconds)
                spread = f"{min(seconds):.3f}–{max(seconds):.3f}"
                print(f"| {cache} | {name} | {median:.3f} | {spread} | {nbytes / median / 1e9:.2f} |", flush=True)
    finally:
        shutil.rmtree(source)
    if options.json:
        options.json.write_text(json.dumps(about | {"bytes": nbytes}, indent=1))


if __name__ == "__main__":
    main()
