"""`plan --mesh`: what ranks hold and read, compared with torch's DTensor on meshes of up to 512 ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gemma4_moe import convert, plan
from gemma4_moe.converter.preview import parse_mesh, predict
from gemma4_moe.errors import UsageError
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict

NATIVE = {"ep": Shard(0), "ep_shard": Shard(1), "dp_shard": Shard(0), "dp_replicate": Replicate()}
MESHES = [
    {"ep": 8},
    {"ep_shard": 2, "ep": 8},
    {"ep_shard": 4, "ep": 128},
    {"ep_shard": 3, "ep": 48},  # 128 experts over 48 ranks: 3 each, and 5 ranks with less
    {"dp_replicate": 2, "dp_shard": 100},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shares_are_those_of_dtensor_and_every_expert_is_owned_once(real, mesh):
    planned = plan(real, to="nemo").plan
    prediction = predict(planned, mesh)
    # Rows and inner sizes of a whole tensor [E, H, 1], which stands for all with the same first two axes.
    whole = {"gate_and_up_projs": (128, 2816, 1408), "down_projs": (128, 704, 2816)}
    owned = dict.fromkeys(whole, 0)
    world = torch.Size(mesh.values()).numel()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        device_mesh = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
        placements = [NATIVE[name] for name in mesh]
        nbytes = 0
        for name, (experts, inner, outer) in whole.items():
            stand_in = torch.empty(experts, inner, 1, dtype=torch.int8)
            local = distribute_tensor(stand_in, device_mesh, placements, src_data_rank=None).to_local()
            elements = local.numel() * outer
            nbytes += 30 * 2 * elements
            owned[name] += elements
        assert prediction.shares[rank].expert_bytes == nbytes, (rank, mesh)
        assert prediction.shares[rank].experts == local.shape[0]
        dist.destroy_process_group()
    replicas = mesh.get("dp_replicate", 1)
    assert owned == {name: 128 * inner * outer * replicas for name, (_, inner, outer) in whole.items()}
    assert prediction.other_bytes == 51_611_872_412 - 45_675_970_560 - 30 * 128 * 2


def test_bytes_read_are_whole_experts_and_the_scales_and_none_without_experts(real, tmp_path):
    prediction = predict(plan(real, to="nemo").plan, {"ep_shard": 2, "ep": 8})
    experts = 16 * (1_015_021_568 + 507_510_784) // 128
    assert {share.read_bytes for share in prediction.shares} == {30 * (experts + 128 * 2)}
    assert prediction.balance == 1.0
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(E=5))
    prediction = predict(plan(source).plan, {"ep": 4})
    assert [share.experts for share in prediction.shares] == [2, 2, 1, 0]
    assert prediction.shares[3].read_bytes == 0
    assert prediction.balance == pytest.approx(2 / 1.25)


def test_plan_previews_a_mesh_given_as_text_or_as_a_mapping(real):
    assert plan(real).mesh is None
    mesh = {"ep_shard": 2, "ep": 8}
    assert plan(real, mesh="ep_shard=2,ep=8").mesh == plan(real, mesh=mesh).mesh == predict(plan(real).plan, mesh)
    with pytest.raises(UsageError, match="not a mesh"):
        plan(real, mesh={"ep": 0})


@pytest.mark.parametrize("text", ["", "ep", "ep=", "ep=0", "ep=-2", "tp=2", "ep=2,ep=2", "ep=99999999", "ep=²"])
def test_what_is_no_mesh_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not a mesh"):
        parse_mesh(text)


def test_a_mesh_is_for_the_nemo_layout(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    convert(source, tmp_path / "nemo")
    with pytest.raises(UsageError, match="nemo layout"):
        predict(plan(tmp_path / "nemo").plan, {"ep": 2})
