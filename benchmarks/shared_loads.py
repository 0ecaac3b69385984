"""`load_hf` on several ranks, each reading for itself or each byte read by one: seconds, and bytes read.

    torchrun --nproc-per-node 2 benchmarks/shared_loads.py DIRECTORY [--layers 4] [--experts 128] [--device cuda]

DIRECTORY is on the disk to be measured; a checkpoint of 1.5 GB a layer is written into it and removed. Warm times are
medians of three loads after one; cold ones are of two, the page cache emptied before each. Bytes are those of all
ranks, over the size of the file. Both ways must fill the model with the same values.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from across_ranks import start
from loading import forget
from real_layers import H, I, write_source
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from gemma4_moe import load_hf, plan
from gemma4_moe.distributed.placements import local_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Model = dict[str, torch.Tensor]

#: The axis that the ranks cut of the experts [E, ...], and of all other tensors; None leaves them whole.
PLACEMENTS = {
    "replicas": (None, None),
    "ep": (0, None),
    "ep and FSDP": (0, 0),
    "ep_shard": (1, None),
}


def empty_model(directory: Path, mesh: DeviceMesh, axes: tuple[int | None, int | None], device: torch.device) -> Model:
    """Return the native model's tensors, cut along one axis where the ranks divide it."""
    model: Model = {}
    for name, tensor in plan(directory).plan.tensors.items():
        axis, shape = axes[0 if ".experts." in name else 1], list(tensor.shape)
        cut = axis is not None and axis < len(shape) and shape[axis] % mesh.size() == 0
        if cut:
            shape[axis] //= mesh.size()
        local = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        model[name] = DTensor.from_local(local, mesh, [Shard(axis)], run_check=False) if cut else local
    return model


def once(model: Model, directory: Path, device: torch.device, *, shared: bool, cold: bool) -> tuple[float, int]:
    """Return the seconds of one load on all ranks, and the bytes that this rank read."""
    if cold and dist.get_rank() == 0:
        forget(directory)
    for tensor in model.values():
        local_of(tensor).zero_()
    wait(device)
    begin = time.perf_counter()
    loaded = load_hf(model, directory, share_reads=shared)
    wait(device)
    return time.perf_counter() - begin, loaded.read_bytes


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = start(options.device)
    first, place = dist.get_rank() == 0, options.directory / "shared-loads"
    if first:
        write_source(place, options.layers, (options.experts, H, I))
        print("| placement | page cache | reads | seconds | GB/s of the file | bytes read |")
        print("| --- | --- | --- | --- | --- | --- |")
    dist.barrier()
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for placement, axes in PLACEMENTS.items():
        model = empty_model(place, mesh, axes, device)
        values: dict[bool, list[torch.Tensor]] = {}
        for cold in (False, True):
            for shared in (False, True):
                runs = [once(model, place, device, shared=shared, cold=cold) for _ in range(2 if cold else 4)]
                values[shared] = [local_of(tensor).double().sum().cpu() for tensor in model.values()]
                read = torch.tensor([runs[-1][1]], dtype=torch.float64, device=device)
                dist.all_reduce(read)
                seconds = statistics.median(took for took, _ in (runs if cold else runs[1:]))
                if first:
                    cells = (placement, "cold" if cold else "warm", "shared" if shared else "alone", f"{seconds:.3f}")
                    print(
                        "|", " | ".join(cells), f"| {size / seconds / 1e9:.2f} | {float(read) / size:.3f} |", flush=True
                    )
        assert values[True] == values[False], placement
    dist.barrier()
    if first:
        shutil.rmtree(place)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
