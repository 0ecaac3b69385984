"""A broadcast that fails ends on all ranks in words, in time, and the next pass gives equal bits."""

import time
from contextlib import suppress

import pytest
import torch.distributed as dist

from gemma4_moe.errors import ParallelError, UsageError
from gemma4_moe.refit import WeightStream, broadcasting
from support import ranks
from support.faults import LIMIT, PLACES, TENSORS, consume, described, layered
from support.streams import ADAPTER, LARGEST, assert_same_stream, expected_stream, nemo_state

SENDER, FAULTY, OTHER = 0, 1, 2


def good_pass(group=None):
    """One pass that arrives, with equal bits."""
    nemo = nemo_state()
    if dist.get_rank() == SENDER:
        broadcasting.send(WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST), group, timeout=20)
    else:
        with broadcasting.receive(SENDER, copy_up_to=0, group=group, timeout=20) as tensors:
            found = consume(tensors)
        assert found == described(expected_stream(nemo))


def take_part(fault, at):
    """One pass in which one receiver misbehaves."""
    if dist.get_rank() == SENDER:
        broadcasting.send(WeightStream(nemo_state(), ADAPTER, bucket_bytes=LARGEST), timeout=LIMIT)
        return
    fault = fault if dist.get_rank() == FAULTY else None
    if fault == "is late":
        time.sleep(1.5 * LIMIT)
    with broadcasting.receive(SENDER, copy_up_to=0, timeout=2 * LIMIT) as tensors:
        consume(tensors, fault, at)


def faulty_pass(fault, at, words):
    """The same, and every side ends in words and within the limit."""
    rank, start = dist.get_rank(), time.monotonic()
    with pytest.raises((ParallelError, ValueError)) as caught:
        take_part(fault, at)
    message = str(caught.value)
    if rank == SENDER:
        assert time.monotonic() - start < LIMIT + 2
        assert f"rank {FAULTY}" in message
        assert words in message
    elif rank == FAULTY and fault == "raises":
        assert message == "the engine is full"
    else:
        assert "the sender, rank 0," in message


WORDS = {"raises": "ValueError: the engine is full", "sleeps": f"within {LIMIT:g} s", "is late": f"within {LIMIT:g} s"}


@pytest.mark.parametrize("fault", ["raises", "sleeps"])
def test_a_receiver_that_fails_ends_all_and_the_next_pass_works(fault):
    ranks.run(3, check_faults, fault, [at for place, at in PLACES.items() if place != "after the last"])


def check_faults(fault, places):
    for at in places:
        faulty_pass(fault, at, WORDS[fault])
        dist.barrier()  # the group is still usable
        good_pass()


def test_a_late_receiver_ends_all_and_the_next_pass_works():
    ranks.run(3, check_faults, "is late", [-1])


@pytest.mark.parametrize("fault", ["raises", "sleeps"])
def test_a_receiver_that_fails_after_the_last_tensor_ends_the_sender(fault):
    ranks.run(2, check_after_the_last, fault)


def check_after_the_last(fault):
    faulty_pass(fault, PLACES["after the last"], WORDS[fault])
    good_pass()


@pytest.mark.parametrize("place", PLACES)
def test_a_receiver_that_dies_ends_the_others_and_a_new_group_works(place):
    ranks.run(3, check_death, PLACES[place], meet_at_end=False)


def check_death(at):
    stream, start = WeightStream(nemo_state(), ADAPTER, bucket_bytes=LARGEST), time.monotonic()
    if dist.get_rank() == SENDER:
        with pytest.raises(ParallelError, match=rf"(?s)rank {FAULTY},.*within {LIMIT:g} s"):
            broadcasting.send(stream, timeout=LIMIT)
        assert time.monotonic() - start < LIMIT + 2
    else:
        fault = "dies" if dist.get_rank() == FAULTY else None
        # Once it has the last tensor, a receiver learns of another's death only if it is still in its block.
        told = (
            suppress(ParallelError) if at > TENSORS - 5 else pytest.raises(ParallelError, match="the sender, rank 0,")
        )
        with told, broadcasting.receive(SENDER, copy_up_to=0, timeout=20) as tensors:
            consume(tensors, fault, at)
    good_pass(dist.new_group([SENDER, OTHER], use_local_synchronization=True))


@pytest.mark.parametrize("fault", ["raises", "dies"])
def test_a_sender_that_fails_ends_the_receiver(fault):
    ranks.run(2, check_sender, fault, meet_at_end=False)


def check_sender(fault):
    """The sender is rank 1: rank 0 holds the store."""
    nemo = nemo_state()
    if dist.get_rank() == 1:
        state = layered(nemo)
        stream = WeightStream(state, ADAPTER, bucket_bytes=LARGEST)
        state.broken = fault
        with pytest.raises(LookupError, match="no such page"):
            broadcasting.send(stream, timeout=LIMIT)
        state.broken = None
        broadcasting.send(stream, timeout=20)
        return
    words = "LookupError: no such page" if fault == "raises" else "rank 1, did not"
    with pytest.raises(ParallelError, match=words), broadcasting.receive(1, copy_up_to=0, timeout=2 * LIMIT) as tensors:
        consume(tensors)
    if fault == "raises":
        with broadcasting.receive(1, copy_up_to=0, timeout=20) as tensors:
            found = consume(tensors)
        assert found == described(expected_stream(nemo))


def test_a_consumer_may_keep_tensors_within_its_buffers():
    ranks.run(2, check_keeping)


def check_keeping():
    nemo = nemo_state()
    if dist.get_rank() == SENDER:
        stream = WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST)
        with pytest.raises(ParallelError, match="still holds all 2 buffers"):
            broadcasting.send(stream, timeout=20)
        broadcasting.send(stream, timeout=20)
        return
    words = "still holds all 2 buffers"
    with (
        pytest.raises(UsageError, match=words),
        broadcasting.receive(SENDER, copy_up_to=0, buffers=2, timeout=20) as tensors,
    ):
        list(tensors)
    with broadcasting.receive(SENDER, copy_up_to=0, buffers=20, timeout=20) as tensors:
        assert_same_stream(list(tensors), expected_stream(nemo))


def test_a_pass_leaves_no_keys_in_the_store():
    ranks.run(2, check_keys)


def check_keys():
    store = dist.distributed_c10d._get_default_store()
    good_pass()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    good_pass()
    dist.barrier()
    assert store.num_keys() == before
    dist.barrier()
