"""The stream over 2 and 4 gloo ranks: the same names, order and bits as in one process, on every rank or on one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed.placement_checks import CASES, on_the_road_of_a_gpu, shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import ParallelError, UsageError
from gemma4_moe.refit import WeightStream
from support import ranks
from support.collectives import Collectives
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import ADAPTER, assert_same_stream, copied, expected_stream, nemo_state, per_expert

BF16, FP32 = torch.bfloat16, torch.float32
#: Experts, hidden size, inner size: uneven on every axis; for 4 ranks with fewer experts than ranks, too.
SIZES = {2: [(5, 9, 7)], 4: [(6, 10, 7), (3, 4, 5)]}
#: With axis 2 cut, gate and up lie on different ranks.
INNER = {
    2: ((2,), (Shard(2),), None),
    4: ((2, 2), (Shard(2), Shard(0)), None),
}


@pytest.mark.parametrize("road", ["staged", "in place"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_placement_gives_the_same_stream(world, road):
    ranks.run(world, check_streams, world, road)


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_the_collectives_of_a_pass_follow_from_its_buckets(experts):
    ranks.run(2, check_collectives, experts)


def test_a_sharded_state_in_hf_layout_is_sent_as_it_is():
    ranks.run(2, check_hf_state)


def check_hf_state():
    """Shards of every axis, the scale's too, uneven on each."""
    experts, hidden, inner = SIZES[2][0]
    hf = random_hf_state_dict(layers=2, E=experts, H=hidden, I=inner)
    mesh = init_device_mesh("cpu", (2,))
    for axis in range(3):
        state = {
            name: distribute_tensor(tensor, mesh, [Shard(min(axis, tensor.ndim - 1))], src_data_rank=None)
            for name, tensor in hf.items()
        }
        for mode, values in (("fused", sorted(hf.items())), ("per-expert", per_expert(dict(sorted(hf.items()))))):
            for cast in (None, FP32):
                expected = [(name, tensor.to(cast or tensor.dtype).contiguous()) for name, tensor in values]
                stream = WeightStream(state, experts=mode, dtype=cast, bucket_bytes=2**13)
                assert_same_stream(stream, expected)
                assert_same_stream(copied(stream.buckets()), expected)


def test_ranks_that_disagree_fail_together():
    ranks.run(2, check_disagreement)


@pytest.mark.parametrize("world", [2, 4])
def test_a_consumer_that_stops_early_ends_the_pass_on_all_ranks(world):
    ranks.run(world, check_early_stops, world)


def test_pipeline_stages_stream_the_layers_that_they_have():
    ranks.run(2, check_stages)


def check_collectives(experts):
    """As many with four times the experts, and with many small tensors more."""
    mesh = init_device_mesh("cpu", (2,))

    def calls(count, more):
        nemo = nemo_from_hf(random_hf_state_dict(layers=2, E=count, H=9, I=7, dtype=BF16))
        nemo |= {f"model.language_model.layers.0.more.{number}": torch.ones(6) for number in range(more)}
        state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in nemo.items()}
        stream = WeightStream(state, Gemma4MoEStateDictAdapter(None, MoEConfig(count, 9, 7), None), experts=experts)
        with Collectives() as seen:
            assert len(list(stream.buckets())) == 1
        return seen.calls.total()

    few = calls(4, 0)
    assert few <= 4  # ranks agree, and tell each other of the end; small tensors together
    assert calls(16, 0) == calls(16, 50) == few


def check_streams(world, road):
    if road == "in place":
        on_the_road_of_a_gpu()
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
            stream = WeightStream(state, adapter, dst=dst, **arguments)
            assert_same_stream(stream, here)
            assert_same_stream(copied(stream.buckets()), here)


def check_disagreement():
    """Ranks that differ in what they are about to send fail together, before the first tensor."""
    mesh = init_device_mesh("cpu", (2,))
    nemo = shard(nemo_state(), mesh, (Shard(0),))
    rank = dist.get_rank()
    for arguments in ({"dtype": [BF16, FP32][rank]}, {"layers": [[0], [1]][rank]}, {"bucket_bytes": 2**20 + rank}):
        with pytest.raises(ParallelError, match="ranks disagree"):
            next(WeightStream(nemo, ADAPTER, **arguments).buckets())
    with pytest.raises(ParallelError, match="ranks disagree"):
        next(iter(WeightStream(shard(nemo_state(), mesh, (Shard(rank),)), ADAPTER)))


class ConsumerError(Exception):
    """Raised by the consumer of one rank."""


def take(pairs, stop_at=None):
    """Copy tensors, and raise at the one of this number."""
    taken = []
    for number, (name, tensor) in enumerate(pairs):
        if number == stop_at:
            raise ConsumerError
        taken.append((name, tensor.clone()))
    return taken


def check_early_stops(world):
    """A consumer raises on the last rank alone, on all, or keeps every buffer; then a whole pass follows."""
    mesh = init_device_mesh("cpu", (world,))
    nemo, rank, last = nemo_state(), dist.get_rank(), world - 1
    expected = expected_stream(nemo)
    stream = WeightStream(shard(nemo, mesh, (Shard(0),)), ADAPTER, bucket_bytes=1700)
    for pairs, count in ((iter, len(expected)), (bucket_pairs, len(expected))):
        for place in (0, count // 2, count - 1):
            if rank == last:
                with pytest.raises(ConsumerError):
                    take(pairs(stream), stop_at=place)
            else:
                with pytest.raises(ParallelError, match=f"rank {last} stopped the pass"):
                    take(pairs(stream))
            assert_same_stream(take(pairs(stream)), expected)
        with pytest.raises(ConsumerError):
            take(pairs(stream), stop_at=2)
    few = WeightStream(shard(nemo, mesh, (Shard(0),)), ADAPTER, bucket_bytes=1700, buffers=2)
    if rank == last:
        with pytest.raises(UsageError, match="still holds all 2 buffers"):
            list(few.buckets())
    else:
        with pytest.raises(ParallelError, match=f"rank {last} stopped the pass"):
            copied(few.buckets())
    assert_same_stream(copied(few.buckets()), expected)


def bucket_pairs(stream):
    for bucket in stream.buckets():
        yield from bucket.tensors()


def check_stages():
    """Each stage has its own layers, and no mesh in common."""
    nemo, rank = nemo_state(layers=4), dist.get_rank()

    def is_own(name):
        layer = name.partition(".layers.")[2].partition(".")[0]
        return int(layer) // 2 == rank if layer else rank == 0

    own = {name: tensor for name, tensor in nemo.items() if is_own(name)}
    expected = [pair for pair in expected_stream(nemo) if is_own(pair[0])]
    assert 0 < len(expected) < len(expected_stream(nemo))
    stream = WeightStream(own, ADAPTER)
    assert_same_stream(stream, expected)
    assert_same_stream(copied(stream.buckets()), expected)
    plans = [None, None]
    dist.all_gather_object(plans, [planned.name for planned in stream.plan()])
    assert sorted(plans[0] + plans[1]) == [name for name, _ in expected_stream(nemo)]
