"""Gathers and streams over two GPUs and NCCL give one process's bits, whatever the shards."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed.placement_checks import is_expert, on_the_road_of_a_gpu
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.refit import WeightStream
from support import ranks
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import assert_same_stream, copied, expected_stream

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_shard_is_gathered_and_streamed(axis):
    ranks.run(2, check_all_sizes, axis, backend="nccl")


def check_all_sizes(axis):
    """Packed, as the sizes are small; then, with the limits of a GPU made small, in place."""
    for _ in range(2):
        for sizes in ((8, 72, 40), (5, 9, 7), (1, 6, 4)):
            check(axis, *sizes)
        on_the_road_of_a_gpu()


def check(axis, E, H, I):  # noqa: E741
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, dtype=torch.bfloat16)
    nemo = nemo_from_hf(random_hf_state_dict(layers=2, E=E, H=H, I=I))
    mesh = init_device_mesh("cuda", (2,))
    state = {
        name: distribute_tensor(tensor.cuda(), mesh, [Shard(axis if is_expert(name) else 0)], src_data_rank=None)
        for name, tensor in nemo.items()
    }
    whole = {name: tensor.cpu() for name, tensor in adapter.to_hf(state, gather=True).items()}
    assert_same_tensors(whole, hf_from_nemo(nemo))
    for name, tensor in state.items():
        for hf, single in adapter.convert_single_tensor_to_hf(name, tensor):
            assert torch.equal(single.cpu(), whole[hf]), hf
    for experts in ("fused", "per-expert"):
        for cast in (None, torch.float32):
            expected = expected_stream(nemo, experts=experts, dtype=cast)
            largest = max(tensor.nbytes for _, tensor in expected_stream(nemo, dtype=cast))
            for dst in (None, 1):
                here = expected if dst in (None, dist.get_rank()) else []
                stream = WeightStream(state, adapter, experts=experts, dtype=cast, bucket_bytes=largest, dst=dst)
                assert_same_stream(stream, here)
                for _ in range(2):
                    assert_same_stream(copied(stream.buckets()), here)
