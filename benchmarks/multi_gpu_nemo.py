"""NeMo AutoModel's own Checkpointer on several ranks, with our adapter and with its own; a part of `multi_gpu`."""

from __future__ import annotations

import logging
import shutil
import warnings
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from across_ranks import LIMIT, PEER, all_gather, measure, require_same_bits
from torch.distributed.tensor import DTensor, Shard

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.integrations import nemo_automodel

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from across_ranks import Report
    from layers_on_ranks import Case, Sizes

NEEDED = ("transformers", "nemo_automodel.components.checkpoint.checkpointing", "nemo_automodel.components.moe.layers")


def saving(report: Report, case: Case, sizes: Sizes, device: torch.device, directory: Path, options: Namespace) -> None:
    """Save a model of random weights by NeMo's Checkpointer, load it again, and compare every bit."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        for name in NEEDED:
            import_module(name)
    except ImportError as error:
        report.say(f"left out: NeMo's Checkpointer: {error}")
        return
    if not case.known_to_peer:
        report.say(f"left out: NeMo's Checkpointer at {case.name}: NeMo has no such mesh")
        return
    for adapter in ("ours",) if options.no_peer else ("ours", PEER):
        with nemo_automodel.installed() if adapter == "ours" else nullcontext():
            save_and_load(report, case, adapter, *build(case, sizes, device, directory / adapter), options.repeats)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory / adapter)


def save_and_load(
    report: Report, case: Case, adapter: str, model: torch.nn.Module, checkpointer: Any, target: Path, repeats: int
) -> None:
    """Time both, of which each load reads what the save before it has written; then load once more and compare."""
    device = next(model.parameters()).device
    experts = [parameter for name, parameter in model.named_parameters() if ".moe.experts." in name]
    weights = {name: local_of(tensor) for name, tensor in model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    saved: list[Path] = []

    def save() -> None:
        saved.append(target / str(len(saved)))
        checkpointer.save_model(model, str(saved[-1]))

    def load() -> None:
        checkpointer.load_model(model, str(saved[-1] / "model"))

    def remove_older() -> None:
        if dist.get_rank() == 0:
            for path in saved[:-1]:
                shutil.rmtree(path, ignore_errors=True)

    gathered = all_gather(experts, device)
    found = measure(
        {LIMIT: gathered, f"{adapter}, save": save, f"{adapter}, load": load}, repeats, device, remove_older
    )
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    load()
    equal = require_same_bits(weights, kept)
    for name, row in found.items():
        more = {"extra GiB": f"{row.extra_bytes / 2**30:.2f}", "tensors equal": "–" if name == LIMIT else equal}
        report.row("NeMo's Checkpointer", case.name, name, row, found[LIMIT], more)


def build(case: Case, sizes: Sizes, device: torch.device, target: Path) -> tuple[torch.nn.Module, Any, Path]:
    """Return NeMo's model with experts of these sizes and a small rest, parallelised by NeMo, and its Checkpointer."""
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.distributed.mesh import MeshContext, ParallelismSizes
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.gemma4_moe.model import Gemma4ForConditionalGeneration
    from nemo_automodel.components.moe.parallelizer import parallelize_model

    config = build_model("multimodal", layers=sizes.layers).config
    experts = {"num_experts": sizes.E, "hidden_size": sizes.H, "moe_intermediate_size": sizes.I}
    config.text_config.update(experts | {"dtype": "bfloat16"})
    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch")
    model = Gemma4ForConditionalGeneration(config, backend=backend).to(device, torch.bfloat16)
    moe_mesh = None
    if dist.get_world_size() > 1:
        mesh = MeshContext.build(FSDP2Config(), ParallelismSizes(ep_size=case.ep), world_size=dist.get_world_size())
        moe_mesh = mesh.moe_mesh
        parallelize_model(model, mesh.device_mesh, moe_mesh, **mesh.parallelize_axis_kwargs())
    for number, tensor in enumerate(model.state_dict().values()):
        cut = isinstance(tensor, DTensor) and all(isinstance(placement, Shard) for placement in tensor.placements)
        seed = number * dist.get_world_size() + (dist.get_rank() if cut else 0)
        local_of(tensor).normal_(generator=torch.Generator(device).manual_seed(seed))
    config = CheckpointingConfig(checkpoint_dir=target, save_consolidated=False)
    return model, config.build(dist.get_rank(), 0, 0, moe_mesh), target
