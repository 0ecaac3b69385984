"""One real-size layer over gloo ranks: gathered and sharded `to_hf`, beside the peer's and the wire's own limit.

    python benchmarks/distributed.py [--world 2|4] [--repeat 5] [--peer] [--experts 128] [--json FILE]

World 2 is ep 2, world 4 is ep_shard 2 × ep 2. The limit is one all-gather of the same bytes. Times are those of the
slowest rank, in seconds; memory is the most that a rank's resident size grew, in bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig

if TYPE_CHECKING:
    from collections.abc import Callable

H, I = 2816, 704  # noqa: E741
LAYER = "model.language_model.layers.0."
LIMIT = "all-gather of the same bytes (limit)"
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(action: Callable[[], Any], repeat: int) -> dict[str, Any]:
    """Seconds of the slowest rank for each run, and how far the resident size of any rank rose."""
    seconds, grown = [], []
    for _ in range(repeat):
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before, start = resident("VmRSS"), time.perf_counter()
        result = action()
        took = torch.tensor([time.perf_counter() - start, float(resident("VmHWM") - before)], dtype=torch.float64)
        del result
        dist.all_reduce(took, dist.ReduceOp.MAX)
        seconds.append(float(took[0]))
        grown.append(int(took[1]))
    return {"seconds": seconds, "grown_bytes": max(grown)}


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=20)
    dist.init_process_group("gloo", rank=rank, world_size=options.world, timeout=limit)
    shape = (options.world,) if options.world == 2 else (2, 2)
    names = ("ep",) if options.world == 2 else ("ep_shard", "ep")
    placements = (Shard(0),) if options.world == 2 else (Shard(1), Shard(0))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    E = options.experts
    shapes = {LAYER + "moe.experts.gate_and_up_projs": (E, H, 2 * I), LAYER + "moe.experts.down_projs": (E, I, H)}
    state = {}
    for name, whole in shapes.items():
        local = [*whole]
        for ranks, placement in zip(shape, placements, strict=True):
            local[placement.dim] //= ranks
        part = torch.randint(-(2**15), 2**15, local, dtype=torch.int16).view(torch.bfloat16)
        stride = (whole[1] * whole[2], whole[2], 1)
        state[name] = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride
        )
    parts = [tensor.to_local().flatten() for tensor in state.values()]

    def all_gather() -> list[torch.Tensor]:
        gathered = []
        for part in parts:
            whole = torch.empty(part.numel() * options.world, dtype=part.dtype)
            ALL_GATHER(whole.view(torch.uint8), part.view(torch.uint8))
            gathered.append(whole)
        return gathered

    ours = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, dtype=torch.bfloat16)
    actions: dict[str, Callable[[], Any]] = {
        LIMIT: all_gather,
        "ours, gather=True": lambda: ours.to_hf(state, gather=True),
        "ours, gather=False": lambda: ours.to_hf(state),
    }
    if options.peer:
        from nemo_automodel.components.models.gemma4_moe.state_dict_adapter import (
            Gemma4MoEStateDictAdapter as PeerAdapter,
        )

        config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
        peer = PeerAdapter(config, SimpleNamespace(n_routed_experts=E), None, dtype=torch.bfloat16)
        full_mesh = mesh if options.world == 4 else init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep_shard", "ep"))
        actions["nemo-automodel 0.7.0 to_hf"] = lambda: peer.to_hf(state, device_mesh=full_mesh)
    results: dict[str, dict[str, Any]] = {}
    if rank == 0:
        whole = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
        print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
        print(
            f"world {options.world}; one layer [{E}, {H}, {I}] bf16: {whole:,} B, a rank {whole // options.world:,} B"
        )
        print(f"{'':38} {'median s':>9} {'min':>7} {'max':>7} {'/ limit':>8} {'grown GiB':>10}")
    for name, action in actions.items():
        results[name] = measure(action, 1 if "nemo" in name else options.repeat)
        if rank == 0:
            print_row(name, results[name], statistics.median(results[LIMIT]["seconds"]))
    if rank == 0 and options.json:
        Path(options.json).write_text(json.dumps({"world": options.world, "results": results}, indent=1))
    dist.destroy_process_group()


def print_row(name: str, result: dict[str, Any], limit: float) -> None:
    seconds = result["seconds"]
    median = statistics.median(seconds)
    print(
        f"{name:38} {median:9.3f} {min(seconds):7.3f} {max(seconds):7.3f} {median / limit:8.3f} "
        f"{result['grown_bytes'] / 2**30:10.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, choices=[2, 4], default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="also nemo-automodel, which needs much memory")
    parser.add_argument("--experts", type=int, default=128, help="fewer where memory is short")
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    mp.spawn(rank_main, (options, 29501 + os.getpid() % 1000), options.world)


if __name__ == "__main__":
    main()
