"""What NeMo AutoModel's own Checkpointer takes on top of the adapter, at the sizes of the real model's layers.

    python benchmarks/nemo_save.py                              # one process, our adapter and NeMo's
    torchrun --nproc-per-node 2 benchmarks/nemo_save.py         # FSDP without expert parallelism, ours alone

For each step of a save and of a load: seconds, and how much memory the process holds at most during the step, and still
holds after it, beyond what it held before the save or load, as a multiple of the rank's expert bytes. Mapped files are
not counted. The limit is 0 everywhere: the weights are in memory before a save, and have their place before a load.
"""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.integrations import nemo_automodel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

E, H, I = 128, 2816, 704  # noqa: E741
STEPS = {
    "save": ["_maybe_adapt_state_dict_to_hf", "_materialize_to_hf_views_for_save", "Checkpointer._do_save"],
    "load": [
        "_maybe_adapt_state_dict_to_hf",
        "Checkpointer._do_load",
        "_maybe_adapt_state_dict_from_hf",
        "ModelState.load_state_dict",
    ],
}


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=2, help="decoder layers, at least 2 (default 2)")
    layers = arguments.parse_args().layers
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    alone = {"init_method": f"file://{tempfile.mkdtemp()}/store", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **({} if dist.is_torchelastic_launched() else alone))
    if dist.get_rank() == 0:
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{layers} layers of E={E}, H={H}, I={I} in bf16; ranks: {dist.get_world_size()}\n")
        print(f"{'adapter':8} {'step':40} {'seconds':>8} {'peak':>6} {'kept':>6}  (× the rank's expert bytes)")
    measure("ours", layers)
    if dist.get_world_size() == 1:
        measure("NeMo's", layers)
    dist.destroy_process_group()


def measure(adapter: str, layers: int) -> None:
    """Save and load a model of random weights with one adapter, and print a line for each step."""
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    with nemo_automodel.installed() if adapter == "ours" else nullcontext():
        model = build(layers)
        experts = sum(local_of(p).nbytes for name, p in model.named_parameters() if ".experts." in name)
        target = shared_directory()
        checkpointer = CheckpointingConfig(checkpoint_dir=target, save_consolidated=False).build(dist.get_rank(), 0, 0)
        actions: dict[str, Callable[[], None]] = {
            "save": lambda: checkpointer.save_model(model, str(target)),
            "load": lambda: checkpointer.load_model(model, str(target / "model")),
        }
        for action, call in actions.items():
            dist.barrier()
            with watched(STEPS[action]) as lines:
                call()
            if dist.get_rank() == 0:
                for step, seconds, peak, kept in lines:
                    label = f"{action}: {step.rpartition('.')[2].lstrip('_')}"
                    print(f"{adapter:8} {label:40} {seconds:8.2f} {peak / experts:6.2f} {kept / experts:6.2f}")
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(target)


def build(layers: int) -> torch.nn.Module:
    """Return NeMo's model with real experts and a small rest, sharded by FSDP where there are several ranks."""
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.distributed.mesh import MeshContext, ParallelismSizes
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.gemma4_moe.model import Gemma4ForConditionalGeneration
    from nemo_automodel.components.moe.parallelizer import parallelize_model

    config = build_model("multimodal", layers=layers).config
    config.text_config.update({"num_experts": E, "hidden_size": H, "moe_intermediate_size": I, "dtype": "bfloat16"})
    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch")
    model = Gemma4ForConditionalGeneration(config, backend=backend).to(torch.bfloat16)
    if dist.get_world_size() > 1:
        mesh = MeshContext.build(FSDP2Config(), ParallelismSizes(), world_size=dist.get_world_size())
        parallelize_model(model, mesh.device_mesh, mesh.moe_mesh, **mesh.parallelize_axis_kwargs())
    for tensor in model.state_dict().values():
        local_of(tensor).fill_(0.5)
    return model


def shared_directory() -> Path:
    """Return a new directory on the working directory's disk, the same on all ranks."""
    names = [tempfile.mkdtemp(dir=".") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(str(names[0])).resolve()


@contextmanager
def watched(steps: list[str]) -> Iterator[list[tuple[str, float, int, int]]]:
    """Wrap functions of NeMo's checkpointing module; give a line (step, seconds, peak bytes, kept bytes) for each."""
    from nemo_automodel.components.checkpoint import checkpointing

    lines: list[tuple[str, float, int, int]] = []
    before = held()
    replaced = []
    for step in steps:
        owner_name, _, name = step.rpartition(".")
        owner: Any = getattr(checkpointing, owner_name) if owner_name else checkpointing
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, timed(step, vars(owner)[name], lines, before))
    try:
        yield lines
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)


def timed(step: str, function: Callable[..., Any], lines: list[tuple[str, float, int, int]], before: int) -> Any:
    """Return `function` with a line added for each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        peak, ended = [held()], threading.Event()
        sampler = threading.Thread(target=sample, args=(peak, ended))
        sampler.start()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
        ended.set()
        sampler.join()
        lines.append((step, seconds, max(peak) - before, held() - before))
        return result

    return call


def sample(peak: list[int], ended: threading.Event) -> None:
    """Keep the most memory that is seen in `peak`, looking every five milliseconds."""
    while not ended.wait(0.005):
        peak[0] = max(peak[0], held())


def held() -> int:
    """Return the memory of this process in bytes, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
