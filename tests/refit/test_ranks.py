"""The stream over 2 and 4 gloo ranks: the same names, order and bits as in one process, on every rank or on one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed.placement_checks import CASES, shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import ParallelError
from gemma4_moe.refit import WeightStream
from support import ranks
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import ADAPTER, assert_same_stream, copied, expected_stream, nemo_state

BF16, FP32 = torch.bfloat16, torch.float32
#: Experts, hidden size, inner size: uneven on every axis; for 4 ranks with fewer experts than ranks, too.
SIZES = {2: [(5, 9, 7)], 4: [(6, 10, 7), (3, 4, 5)]}
#: With axis 2 cut, gate and up lie on different ranks.
INNER = {
    2: ((2,), (Shard(2),), None),
    4: ((2, 2), (Shard(2), Shard(0)), None),
}


@pytest.mark.parametrize("world", [2, 4])
def test_every_placement_gives_the_same_stream(world):
    ranks.run(world, check_streams, world)


def test_ranks_that_disagree_fail_together():
    ranks.run(2, check_disagreement)


def check_streams(world):
    for mesh_shape, placements, names in [*CASES[world], INNER[world]]:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for sizes in SIZES[world]:
            check_stream(mesh, placements, sizes, *((FP32, BF16) if sizes[0] == 5 else (BF16, None)))


def check_stream(
    mesh,
    placements,
    sizes,
    dtype,
    cast,
):
    experts, hidden, inner = sizes
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(experts, hidden, inner), None)
    nemo = nemo_from_hf(random_hf_state_dict(layers=2, E=experts, H=hidden, I=inner, dtype=dtype))
    state = shard(nemo, mesh, placements)
    name = "model.language_model.embed_tokens.weight"
    state[name] = distribute_tensor(nemo[name], mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
    last = dist.get_world_size() - 1
    for mode in ("fused", "per-expert"):
        expected = expected_stream(nemo, experts=mode, dtype=cast)
        largest = max(tensor.nbytes for _, tensor in expected_stream(nemo, dtype=cast))
        arguments = {"experts": mode, "dtype": cast, "bucket_bytes": largest}
        for dst, here in ((None, expected), (last, expected if dist.get_rank() == last else [])):
            stream = WeightStream(adapter, state, dst=dst, **arguments)
            assert_same_stream(stream, here)
            assert_same_stream(copied(stream.buckets()), here)


def check_disagreement():
    """Ranks that differ in what they are about to send fail together, before the first tensor."""
    mesh = init_device_mesh("cpu", (2,))
    nemo = shard(nemo_state(), mesh, (Shard(0),))
    rank = dist.get_rank()
    for arguments in ({"dtype": [BF16, FP32][rank]}, {"layers": [[0], [1]][rank]}, {"bucket_bytes": 2**20 + rank}):
        with pytest.raises(ParallelError, match="ranks disagree"):
            next(WeightStream(ADAPTER, nemo, **arguments).buckets())
    with pytest.raises(ParallelError, match="ranks disagree"):
        next(iter(WeightStream(ADAPTER, shard(nemo_state(), mesh, (Shard(rank),)))))
