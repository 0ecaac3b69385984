"""A consumer that stops early on one of several ranks: the others learn of it, and the next pass gives equal bits."""

import time
from contextlib import closing

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from distributed.placement_checks import shard
from gemma4_moe.errors import DifferenceError, InputError, ParallelError, UsageError
from gemma4_moe.refit import WeightStream
from support import ranks
from support.streams import ADAPTER, LARGEST, assert_same_stream, copied, expected_stream, nemo_state

#: Meshes, and a placement of experts on each; the second cuts gate and up apart.
MESHES = {2: [((2,), (Shard(0),)), ((2,), (Shard(2),))], 4: [((2, 2), (Shard(1), Shard(0)))]}


@pytest.mark.parametrize("world", [2, 4])
def test_a_consumer_that_stops_is_named_to_the_others(world):
    ranks.run(world, check_stops, world)


def check_stops(world):
    for shape, placements in MESHES[world]:
        mesh = init_device_mesh("cpu", shape)
        state = shard(nemo_state(), mesh, placements)
        for experts in ("fused", "per-expert"):
            stream = WeightStream(state, ADAPTER, experts=experts, bucket_bytes=LARGEST)
            expected = expected_stream(nemo_state(), experts=experts)
            count = len(stream.plan())
            for stopper, last in ((world - 1, 0), (0, count // 2), (world // 2, count - 1)):
                check_stop(stream, iter, stopper, last, expected)
            count = sum(1 for _ in stream.buckets())
            for stopper, last in ((0, 0), (world - 1, count // 2), (1, count - 1)):
                check_stop(stream, WeightStream.buckets, stopper, last, expected)


def check_stop(stream, start, stopper, last, expected):
    """One rank's consumer raises at the item `last`; the others read all, and are told."""
    if dist.get_rank() == stopper:
        with pytest.raises(ZeroDivisionError):
            consume(start(stream), last)
    else:
        began = time.monotonic()
        with pytest.raises(ParallelError, match=f"(?s)rank {stopper} stopped the pass.*next pass"):
            consume(start(stream), None)
        assert time.monotonic() - began < 20  # the group's own limit is 60 seconds
    assert_same_stream(stream, expected)


def consume(pairs, last):
    """Read all, or fail at the item `last`."""
    for number, _ in enumerate(pairs):
        if number == last:
            raise ZeroDivisionError


def test_all_ranks_that_stop_are_no_error_and_too_many_held_buckets_are_one():
    ranks.run(2, check_other_ends)


def check_other_ends():
    """All ranks break; one rank keeps its iterator; one rank holds every bucket; the state changes on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    nemo = nemo_state()
    state = shard(nemo, mesh, (Shard(0),))
    stream = WeightStream(state, ADAPTER, bucket_bytes=LARGEST, buffers=3)
    expected = expected_stream(nemo)
    for _ in stream:
        break
    with closing(stream.buckets()) as buckets:
        next(buckets)
    assert_same_stream(stream, expected)
    kept = []
    if dist.get_rank() == 0:
        with pytest.raises(UsageError, match="still holds all 3 buffers"):
            kept.extend(stream.buckets())
    else:
        with pytest.raises(ParallelError, match="rank 0 stopped the pass"):
            copied(stream.buckets())
    assert_same_stream(copied(stream.buckets()), expected)
    if dist.get_rank() == 1:
        state["new"] = state["model.language_model.embed_tokens.weight"]
        with pytest.raises(ValueError, match="changed since the stream was planned"):
            list(stream)
    else:
        with pytest.raises(ParallelError, match="ranks disagree"):
            list(stream)


def test_a_state_that_is_wrong_at_its_end_on_one_rank_ends_the_pass_on_all():
    ranks.run(2, check_last_part)


def check_last_part():
    """A part more on one rank is seen after the last tensor."""
    parts = [shard(nemo_state(), init_device_mesh("cpu", (2,)), (Shard(0),))]
    stream = WeightStream(parts, ADAPTER, bucket_bytes=LARGEST)
    for start in (iter, WeightStream.buckets):
        if dist.get_rank() == 1:
            parts.append({"more.weight": parts[0]["model.language_model.embed_tokens.weight"]})
            with pytest.raises(InputError, match="changed since the stream was planned"):
                consume(start(stream), None)
            parts.pop()
        else:
            with pytest.raises(ParallelError, match="rank 1 stopped the pass"):
                consume(start(stream), None)
    assert_same_stream(stream, expected_stream(nemo_state()))


def test_only_one_rank_keeps_and_stops():
    ranks.run(2, check_dst)


def check_dst():
    """The rank that gets the tensors stops; the one that only takes part is told."""
    mesh = init_device_mesh("cpu", (2,))
    stream = WeightStream(shard(nemo_state(), mesh, (Shard(0),)), ADAPTER, bucket_bytes=LARGEST, dst=1)
    for start in (iter, WeightStream.buckets):
        if dist.get_rank() == 1:
            for _ in start(stream):
                break
        else:
            with pytest.raises(ParallelError, match="rank 1 stopped the pass"):
                list(start(stream))
    assert_same_stream(stream, expected_stream(nemo_state()) if dist.get_rank() == 1 else [])


def test_pipeline_stages_stream_their_own_layers():
    ranks.run(2, check_stages)


def check_stages():
    """Each of two stages has its own layers, and no mesh in common."""
    rank = dist.get_rank()
    whole = expected_stream(nemo_state())
    stage = {n: t for n, t in nemo_state().items() if (".layers.2." in n) == (rank == 1)}
    stream = WeightStream(stage, ADAPTER)
    if rank == 1:
        for _ in stream:  # nobody waits for it
            break
    assert_same_stream(stream, [(n, t) for n, t in whole if (".layers.2." in n) == (rank == 1)])
    plans = [None, None]
    dist.all_gather_object(plans, stream.plan())
    reference = [(name, tuple(tensor.shape)) for name, tensor in whole]
    stream.preflight(reference, others=plans)
    with pytest.raises(DifferenceError, match="left out: "):
        stream.preflight(reference)
