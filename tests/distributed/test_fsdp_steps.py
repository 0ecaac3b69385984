"""Directories of torch.distributed.checkpoint from plain FSDP2, as torchtitan and Accelerate leave them, as sources."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gemma4_moe import convert, inspect, verify
from support import ranks
from support.checkpoints import write_checkpoint
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import module_of, random_hf_state_dict, read_directory

#: E is uneven over three ranks.
SIZES = {"E": 7, "H": 20, "I": 6}


@pytest.mark.parametrize("layout", ["hf", "nemo"])
@pytest.mark.parametrize(("world", "replicas"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_training_state_is_a_source(world, replicas, nested, layout, tmp_path):
    hf = random_hf_state_dict(**SIZES)
    base = write_checkpoint(tmp_path / "base", hf)
    state = hf if layout == "hf" else nemo_from_hf(hf)
    ranks.run(world, train_and_save, state, replicas, nested, tmp_path / "step")

    found = inspect(tmp_path / "step")
    assert found.tensors == len(state)
    assert "left out" in found.notes[0]
    target = "nemo" if layout == "hf" else "hf"
    convert(tmp_path / "step", tmp_path / target, config_from=base, base=None if layout == "hf" else base)
    assert_same_tensors(read_directory(tmp_path / target), nemo_from_hf(hf) if layout == "hf" else hf)
    assert verify(tmp_path / "step", tmp_path / target, config_from=base).different == ()


def train_and_save(state, replicas, nested, directory):
    """Shard a module, let an optimizer make its state without a change, and save both with DCP."""
    sizes = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    module = module_of({name: tensor.clone() for name, tensor in state.items()})
    fully_shard(module, mesh=mesh if replicas > 1 else mesh["shard"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    own = get_model_state_dict(module)
    saved = {"model": own} if nested else dict(own)
    dcp.save(saved | {"optimizer": get_optimizer_state_dict(module, optimizer), "step": 4}, checkpoint_id=directory)
