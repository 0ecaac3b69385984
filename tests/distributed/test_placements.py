"""Every placement, even and uneven: bits equal the one-process result, through the adapter and through torch's DCP."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distributed.placement_checks import CASES, check_all, same, shard
from gemma4_moe import Gemma4MoEStateDictAdapter, convert
from gemma4_moe.adapter import MoEConfig
from support import ranks
from support.checkpoints import write_checkpoint
from support.formulas import hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict


@pytest.mark.parametrize(
    ("world", "road"),
    [(1, "staged"), *((world, road) for world in (2, 3, 4, 8) for road in ("staged", "in place"))],
)
def test_placements(world, road):
    ranks.run(world, check_all, world, road)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_dcp_fills_models_from_both_layouts(world, tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    convert(source, tmp_path / "nemo")
    ranks.run(world, check_dcp, world, source, tmp_path / "nemo")


def check_dcp(world, hf_directory, nemo_directory):
    hf = random_hf_state_dict()
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(6), None)
    for shape, placements, _ in CASES[world]:
        if any(isinstance(placement, _StridedShard) for placement in placements):
            continue  # torch's own planner reads a strided shard as one box
        mesh = init_device_mesh("cpu", shape)
        for dtype in (torch.bfloat16, torch.float32):  # a bf16 file into a bf16 and into an fp32 model
            expected = shard(nemo_from_hf(hf, dtype), mesh, placements)
            model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
            if dtype == torch.bfloat16:
                dcp.load(model, storage_reader=HuggingFaceStorageReader(str(nemo_directory)))
                same(model, expected)
                for tensor in model.values():
                    tensor.fill_(3.0)
            destinations = adapter.to_hf(model, for_checkpoint_load=True)
            dcp.load(destinations, storage_reader=HuggingFaceStorageReader(str(hf_directory)))
            same(adapter.from_hf(destinations), expected)
            same(model, expected)


def test_nothing_of_an_earlier_process_group_is_remembered(tmp_path):
    """Meshes of two groups are equal, and ranks may have changed places."""
    ranks.run(2, check_two_groups, tmp_path / "store", meet_at_end=False)


def check_two_groups(store):
    nemo = nemo_from_hf(random_hf_state_dict(E=5))
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(5), None, dtype=torch.bfloat16)
    other = 1 - dist.get_rank()
    for again in (True, False):
        mesh = init_device_mesh("cpu", (2,))
        for placement in (Shard(0), Shard(1)):
            state = shard(nemo, mesh, (placement,))
            same(adapter.to_hf(state, gather=True), hf_from_nemo(nemo))
        dist.barrier()
        if again:
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=other, world_size=2)
