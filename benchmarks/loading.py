"""`load_hf` of real-size layers, cold, one rank at a time: bytes from the device, memory beside the model, seconds.

    python benchmarks/loading.py DIRECTORY [--layers 2] [--json FILE]

DIRECTORY is on the disk to be measured; a checkpoint of 1.5 GB a layer is written into it and removed. The limit of
bytes is what the rank's experts take in the file, all of their rows, and the other tensors that it holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from real_layers import MLP, E, H, I, write_source

MESHES = {"ep 2": ((2,), (0,)), "ep_shard 2 × ep 2": ((2, 2), (1, 0))}


def forget(directory: Path) -> None:
    """Drop the files' pages from the page cache."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def device_bytes() -> int:
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


def one_rank(directory: Path, mesh_name: str, rank: int, layers: int) -> None:
    """Load as one rank of a mesh, whose other ranks need not be there, and print the figures as JSON."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gemma4_moe import load_hf

    mesh_shape, axes = MESHES[mesh_name]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(mesh_shape).numel())
    mesh = init_device_mesh("cpu", mesh_shape)
    model: dict[str, torch.Tensor] = {}
    expert_rows = E // mesh_shape[-1]
    for layer in range(layers):
        path = f"model.language_model.layers.{layer}.moe."
        for name, shape in (("gate_and_up_projs", (E, H, 2 * I)), ("down_projs", (E, I, H))):
            local = list(shape)
            for ranks, axis in zip(mesh_shape, axes, strict=True):
                local[axis] //= ranks
            part = torch.full(local, 3.0, dtype=torch.bfloat16)
            stride = (shape[1] * shape[2], shape[2], 1)
            placements = [Shard(axis) for axis in axes]
            model[f"{path}experts.{name}"] = DTensor.from_local(
                part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
        model[f"{path}gate.proj.weight"] = torch.full((E, H), 3.0, dtype=torch.bfloat16)
        model[f"{path}gate.scale"] = torch.full((H,), 3.0, dtype=torch.bfloat16)
        model[path.removesuffix("moe.") + "mlp.down_proj.weight"] = torch.full((H, MLP), 3.0, dtype=torch.bfloat16)
    share = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in model.values())
    others = sum(tensor.nbytes for tensor in model.values() if not isinstance(tensor, DTensor))
    limit = layers * (expert_rows * 3 * I * H * 2 + E * 2) + others
    forget(directory)
    Path("/proc/self/clear_refs").write_text("5")
    resident, read, start = status("VmRSS"), device_bytes(), time.perf_counter()
    load_hf(model, directory)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "read_bytes": device_bytes() - read,
                "limit_bytes": limit,
                "extra_bytes": status("VmHWM") - resident,
                "share_bytes": share,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--rank", nargs=2, metavar=("MESH", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint = options.directory / "loading-benchmark"
    if options.rank:
        one_rank(checkpoint, options.rank[0], int(options.rank[1]), options.layers)
        return
    options.directory.mkdir(parents=True, exist_ok=True)
    write_source(checkpoint, options.layers)
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        print(
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {options.layers} real-size layers"
        )
        print(f"{'mesh, rank':24} {'read / limit':>12} {'extra / share':>14} {'extra MiB':>10} {'s':>7} {'GB/s':>6}")
        for mesh, (shape, _) in MESHES.items():
            for rank in range(torch.Size(shape).numel()):
                command = [sys.executable, __file__, str(options.directory), "--layers", str(options.layers)]
                done = subprocess.run([*command, "--rank", mesh, str(rank)], check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
                results.setdefault(mesh, []).append(found)
                print(
                    f"{mesh + ', ' + str(rank):24} {found['read_bytes'] / found['limit_bytes']:12.3f} "
                    f"{found['extra_bytes'] / found['share_bytes']:14.3f} {found['extra_bytes'] / 2**20:10.0f} "
                    f"{found['seconds']:7.2f} {found['read_bytes'] / found['seconds'] / 1e9:6.2f}"
                )
    finally:
        shutil.rmtree(checkpoint)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
