"""Checks of every placement, run on each rank: expected shards come from torch's own distribute_tensor."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.distributed import gathering
from support.formulas import NEMO_ENDINGS, hf_from_nemo, nemo_from_hf, renamed
from support.models import Lazy, random_hf_state_dict

State = dict[str, torch.Tensor]
#: A mesh's shape, the placements of a native expert tensor on it, and names for its dimensions if NeMo has them.
Case = tuple[tuple[int, ...], tuple[Placement, ...], tuple[str, ...] | None]

CASES = {
    1: [((1,), (Shard(0),), ("ep",)), ((1,), (Replicate(),), None)],
    2: [((2,), (Shard(0),), ("ep",)), ((2,), (Shard(1),), None), ((1, 2), (Shard(1), Shard(0)), ("ep_shard", "ep"))],
    3: [((3,), (Shard(0),), ("dp_shard",)), ((3,), (Shard(1),), None)],
    4: [
        ((4,), (Shard(0),), ("ep",)),
        ((2, 2), (Shard(1), Shard(0)), ("ep_shard", "ep")),
        ((2, 2), (Replicate(), Shard(0)), ("dp_replicate", "dp_shard")),
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), None),
        ((2, 2), (Shard(0), Shard(0)), None),
        ((2, 2), (Replicate(), Replicate()), None),
    ],
    8: [
        ((8,), (Shard(0),), ("dp_shard_cp",)),
        ((2, 4), (Shard(1), Shard(0)), ("ep_shard", "ep")),
        ((4, 2), (Shard(1), Shard(0)), ("ep_shard", "ep")),
        ((2, 2, 2), (Replicate(), Shard(1), Shard(0)), ("ep_replicate", "ep_shard", "ep")),
    ],
}
#: Experts, hidden size, inner size: even, uneven, and fewer experts than ranks.
SIZES = [(8, 12, 16), (6, 10, 7), (5, 9, 11), (3, 4, 5)]


def is_expert(name):
    return "experts" in name or "per_expert_scale" in name


def hf_placements(placements):
    """Of a native tensor's placements, those of the hf tensor: axes 1 and 2 change places."""
    swapped = {0: 0, 1: 2, 2: 1}

    def turned(placement):
        if isinstance(placement, _StridedShard):
            return _StridedShard(swapped[placement.dim], split_factor=placement.split_factor)
        return Shard(swapped[placement.dim]) if isinstance(placement, Shard) else placement

    return tuple(turned(placement) for placement in placements)


def on_experts(placements):
    return tuple(p if isinstance(p, Shard | _StridedShard) and p.dim == 0 else Replicate() for p in placements)


def shard(state, mesh, placements):
    """Shard expert tensors as torch does it, each rank from its own copy; others stay."""
    return {
        name: distribute_tensor(
            tensor, mesh, on_experts(placements) if tensor.ndim == 1 else placements, src_data_rank=None
        )
        if is_expert(name)
        else tensor
        for name, tensor in state.items()
    }


def same(found, expected):
    """Compare keys, global shapes, strides, placements and every bit of the local parts."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor), (name, type(found[name]))
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        if isinstance(tensor, DTensor):
            assert found[name].placements == tensor.placements, (name, found[name].placements)
            assert torch.equal(found[name].to_local(), tensor.to_local()), name
        else:
            assert torch.equal(found[name], tensor), name


def on_the_road_of_a_gpu():
    """Let a rank on the CPU gather as a GPU does, with such limits that small tensors take all its ways."""
    gathering.IN_PLACE_DEVICES.add("cpu")
    gathering.PACKED_BYTES = 100  # some are packed, others aren't
    gathering._BLOCK_BYTES = 0  # several blocks


def check_all(world, road):
    """`road` is that of a CPU, staged, or that of a GPU, in place."""
    if road == "in place":
        on_the_road_of_a_gpu()
    for shape, placements, names in CASES[world]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for sizes in SIZES:
            check_placement(mesh, placements, sizes, torch.bfloat16, torch.bfloat16)
        check_placement(mesh, placements, SIZES[1], torch.bfloat16, torch.float32)
    if world == 1:
        check_mesh_of_one()


def check_mesh_of_one():
    """A mesh of one rank is no mesh."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep_shard", "ep"))
    adapter = Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.bfloat16)
    hf = random_hf_state_dict()
    same(adapter.from_hf(hf, device_mesh=mesh), nemo_from_hf(hf))
    same(adapter.to_hf(nemo_from_hf(hf), device_mesh=mesh), hf_from_nemo(nemo_from_hf(hf)))


def check_placement(mesh, placements, sizes, file, model):
    experts, hidden, inner = sizes
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(experts, hidden, inner), None, dtype=model)
    hf = random_hf_state_dict(E=experts, H=hidden, I=inner, dtype=file, layers=2)
    nemo = nemo_from_hf(hf, model)
    back = hf_from_nemo(nemo)
    sharded_hf, sharded_nemo = shard(hf, mesh, hf_placements(placements)), shard(nemo, mesh, placements)
    untouched = {name: tensor.clone() for name, tensor in hf.items()}

    same(adapter.from_hf(sharded_hf), sharded_nemo)
    if mesh.mesh_dim_names is not None and mesh.size() > 1:
        same(adapter.from_hf(hf, mesh), sharded_nemo)
        same(adapter.from_hf(local_parts(sharded_hf), mesh), sharded_nemo)
        check_lazy(adapter, hf, sharded_nemo, mesh)
        native_parts = local_parts(sharded_nemo)
        same({k: whole(v) for k, v in adapter.to_hf(native_parts, device_mesh=mesh).items()}, back)
        same(adapter.to_hf(native_parts, device_mesh=mesh, gather=True), back)
        for name, part in native_parts.items():
            if is_expert(name):
                assert torch.equal(adapter._gather_expert_tensor(part, mesh, experts), nemo[name]), name
        same(adapter.to_hf(nemo, device_mesh=mesh), back)
    check_out(adapter, hf, sharded_nemo)

    shared = adapter.to_hf(sharded_nemo)
    same(shared, shard(back, mesh, hf_placements(placements)))
    for name, tensor in shared.items():
        if isinstance(tensor, DTensor) and tensor.ndim == 3:
            source = sharded_nemo[renamed(name, NEMO_ENDINGS)]
            assert tensor.to_local().untyped_storage().data_ptr() == source.to_local().untyped_storage().data_ptr()
    same({name: whole(tensor) for name, tensor in shared.items()}, back)
    same(adapter.from_hf(shared), sharded_nemo)
    for staging in (1, 1000, 2**20):
        same(adapter.to_hf(sharded_nemo, gather=True, staging_bytes=staging), back)
    singly = {k: v for name, t in sharded_nemo.items() for k, v in adapter.convert_single_tensor_to_hf(name, t)}
    same(singly, back)
    for name, tensor in sharded_nemo.items():
        if is_expert(name):
            assert torch.equal(adapter._gather_expert_tensor(tensor, None, experts), nemo[name]), name
    check_destinations(adapter, hf, sharded_nemo, mesh, placements)
    same(hf, untouched)


def local_parts(state):
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_lazy(adapter, hf, expected, mesh):
    """Lazy values give the same, and no more of an expert tensor is read than this rank holds."""
    lazy = {name: Lazy(tensor) for name, tensor in hf.items()}
    same(adapter.from_hf(iter(lazy.items()), mesh), expected)
    held = sum(t.to_local().numel() for t in expected.values() if isinstance(t, DTensor))
    assert sum(sum(value.read) for name, value in lazy.items() if is_expert(name) and value.tensor.ndim == 3) == held


def check_out(adapter, hf, expected):
    """Given native tensors are filled, whatever their placements, and nothing else is made."""
    out = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    found = adapter.from_hf(hf, out=out)
    assert all(found[name] is out[name] for name in out)
    same(found, expected)


def check_destinations(adapter, hf, expected, mesh, placements):
    """Destinations alias the model; once filled as a checkpoint reader does it, from_hf makes them the fold, once."""
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    destinations = adapter.to_hf(model, for_checkpoint_load=True)
    assert destinations.keys() == hf.keys()
    for name, tensor in shard(hf, mesh, hf_placements(placements)).items():
        if isinstance(tensor, DTensor):
            assert destinations[name].placements == tensor.placements, name
            assert destinations[name].shape == tensor.shape
            destinations[name].to_local().copy_(tensor.to_local())
        else:
            destinations[name].copy_(tensor)
    for _ in range(2):  # the second time changes nothing
        found = adapter.from_hf(destinations)
        assert all(found[name] is model[name] for name in model)
        same(found, expected)
