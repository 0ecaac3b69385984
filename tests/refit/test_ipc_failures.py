"""A pass between processes that fails ends on both sides in words, in time, and the next one gives equal bits."""

import multiprocessing
import time
from contextlib import contextmanager

import pytest
import torch

from gemma4_moe.errors import ParallelError, UsageError
from gemma4_moe.refit import WeightStream, ipc
from support.faults import LIMIT, PLACES, TENSORS, consume, described, layered
from support.ranks import PRELOADED
from support.streams import ADAPTER, LARGEST, assert_same_stream, expected_stream, nemo_state

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@contextmanager
def another_process(target, *arguments):
    """Two connections to a process that calls `target` with their other ends: one for passes, one for reports."""
    (here, there), (reports, reporting) = CONTEXT.Pipe(), CONTEXT.Pipe()
    process = CONTEXT.Process(target=started, args=(target, there, reporting, *arguments), daemon=True)
    process.start()
    there.close()
    reporting.close()
    assert reports.poll(60), "the other process does not start"
    reports.recv()
    yield here, reports
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive


def started(target, connection, reporting, *arguments):
    """Begin once the imports are done: they take longer than the limits of a pass."""
    torch.set_num_threads(1)
    reporting.send("ready")
    target(connection, reporting, *arguments)


def reported(connection):
    assert connection.poll(20), "the other process hangs"
    return connection.recv()


def read_with_faults(connection, reporting, faults):
    """Report the error of each faulty pass, and the tensors of the good pass after it."""
    for fault, at in faults:
        try:
            if fault == "is late":
                time.sleep(1.5 * LIMIT)
            with ipc.receive(connection, copy_up_to=0, timeout=LIMIT) as tensors:
                consume(tensors, fault, at)
            reporting.send("no error")
        except (ParallelError, ValueError) as error:
            reporting.send(str(error))
        with ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
            found = consume(tensors)
        reporting.send(found)


def send_and_fail(stream, connection, words):
    start = time.monotonic()
    with pytest.raises(ParallelError, match=words) as caught:
        ipc.send(stream, connection, timeout=LIMIT)
    assert time.monotonic() - start < LIMIT + 2
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("fault", ["raises", "sleeps"])
def test_a_receiver_that_fails_ends_both_sides_and_the_next_pass_works(fault):
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST)
    expected = described(expected_stream(nemo))
    assert len(expected) == TENSORS
    words = {"raises": r"ValueError: the engine is full", "sleeps": rf"(?s)did not .* within {LIMIT:g} s"}
    with another_process(read_with_faults, [(fault, at) for at in PLACES.values()]) as (connection, reports):
        for place in PLACES:
            message = send_and_fail(stream, connection, words[fault])
            assert place == "before the first" or "the bucket that starts with" in message
            told = reported(reports)
            assert told == "the engine is full" if fault == "raises" else "the sender ended the pass" in told
            ipc.send(stream, connection, timeout=10)
            assert reported(reports) == expected


def test_a_receiver_that_is_late_or_stops_early_ends_both_sides():
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST)
    with another_process(read_with_faults, [("is late", None), ("stops", 7)]) as (connection, reports):
        for words, told in [("did not call `receive` within", "did not send"), ("abandoned before its", "no error")]:
            send_and_fail(stream, connection, words)
            assert told in reported(reports)
            ipc.send(stream, connection, timeout=10)
            assert reported(reports) == described(expected_stream(nemo))


@pytest.mark.parametrize("place", PLACES)
def test_a_receiver_that_dies_ends_the_sender(place):
    stream = WeightStream(nemo_state(), ADAPTER, bucket_bytes=LARGEST)
    with another_process(read_with_faults, [("dies", PLACES[place])]) as (connection, _):
        send_and_fail(stream, connection, "the receiver has closed the connection, or was killed")
    with another_process(read_with_faults, [("raises", 7)]) as (connection, reports):
        send_and_fail(stream, connection, "the engine is full")
        assert reported(reports) == "the engine is full"
        ipc.send(stream, connection, timeout=10)
        assert len(reported(reports)) == TENSORS


def send_with_fault(connection, reporting, fault):
    state = layered(nemo_state())
    stream = WeightStream(state, ADAPTER, bucket_bytes=LARGEST)
    state.broken = fault
    try:
        ipc.send(stream, connection, timeout=LIMIT)
    except LookupError as error:
        reporting.send(str(error))
    state.broken = None
    ipc.send(stream, connection, timeout=10)


@pytest.mark.parametrize(
    ("fault", "words"), [("raises", r"LookupError: no such page"), ("dies", r"the sender has closed the connection")]
)
def test_a_sender_that_fails_ends_the_receiver(fault, words):
    with another_process(send_with_fault, fault) as (connection, reports):
        with pytest.raises(ParallelError, match=words), ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
            consume(tensors)
        if fault == "raises":
            assert reported(reports) == "no such page"
            with ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
                assert consume(tensors) == described(expected_stream(nemo_state()))


def send_often(connection, reporting, buffers):
    stream = WeightStream(nemo_state(), ADAPTER, bucket_bytes=LARGEST, buffers=buffers)
    try:
        ipc.send(stream, connection, timeout=10)
        reporting.send("no error")
    except UsageError as error:
        reporting.send(str(error))


def test_a_consumer_may_keep_every_tensor():
    with another_process(send_often, 20) as (connection, reports):
        with ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
            kept = list(tensors)
        assert reported(reports) == "no error"
        assert_same_stream(kept, expected_stream(nemo_state()))


def test_a_consumer_that_keeps_too_many_ends_both_sides_with_the_same_words():
    with another_process(send_often, 2) as (connection, reports):
        words = "still holds all 2 buffers"
        with pytest.raises(ParallelError, match=words), ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
            list(tensors)
        assert words in reported(reports)


def test_two_buffers_serve_a_consumer_that_keeps_nothing():
    with another_process(send_often, 2) as (connection, reports):
        with ipc.receive(connection, copy_up_to=0, timeout=10) as tensors:
            assert consume(tensors) == described(expected_stream(nemo_state()))
        assert reported(reports) == "no error"
