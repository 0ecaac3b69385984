"""A training program without NeMo: a module with nemo names, its experts over `ep`, all of it over FSDP."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gemma4_moe import load_hf, plan, save_hf
from support.models import module_of


def shard(module, ep, dp):
    """Shard experts over `ep` and then all parameters over `dp`, as FSDP2 does it."""
    mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if name in ("gate_and_up_projs", "down_projs"):
                sharded = distribute_tensor(parameter.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
                setattr(owner, name, nn.Parameter(sharded))
    for owner in module.modules():
        if "gate_and_up_projs" in owner._parameters:
            fully_shard(owner, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])


def run(source, target, ep, dp):
    """Load, and save what was loaded."""
    tensors = plan(source, to="nemo").plan.tensors
    module = module_of({name: torch.full(planned.shape, 3.0) for name, planned in tensors.items()})
    if dist.get_world_size() > 1:
        shard(module, ep, dp)
        experts = next(p for name, p in module.named_parameters() if name.endswith("down_projs"))
        assert isinstance(experts, DTensor)
        assert experts.device_mesh.ndim == 2, "FSDP keeps the experts' own dimension"
    load_hf(module, source)
    save_hf(module, target, config_from=source, max_shard_size="200KB")
