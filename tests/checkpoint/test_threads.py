"""Threads that share work: all of it is done, the first error is raised, and nobody waits long after an interrupt."""

import os
import signal
import threading
import time

import pytest

from gemma4_moe.checkpoint.threads import StoppedError, run_in_threads


def test_every_thread_works_and_all_have_ended():
    names = []

    def work(check):
        check()
        time.sleep(0.02)
        names.append(threading.current_thread().name)

    run_in_threads(3, work, "some")
    assert sorted(names) == ["some-0", "some-1", "some-2"]


def test_the_first_error_is_raised_and_stops_the_others():
    seen = []

    def work(check):
        if threading.current_thread().name.endswith("-1"):
            raise ValueError("of the second thread")
        try:
            while True:
                check()
                time.sleep(0.001)
        except StoppedError:
            seen.append(True)
            raise

    with pytest.raises(ValueError, match="of the second thread"):
        run_in_threads(3, work)
    assert seen == [True, True]


@pytest.fixture
def interruptible():
    """SIGINT raises a KeyboardInterrupt; a background shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("blocked", [False, True])
def test_an_interrupt_ends_the_wait_even_for_a_thread_that_does_not_look(blocked):
    released, ends = threading.Event(), []

    def work(check):
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            if blocked:
                released.wait(20)
            while not blocked:
                check()
                time.sleep(0.001)
        except StoppedError:
            ends.append("stopped")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_threads(1, work)
    assert time.monotonic() - began < 2
    assert ends == ([] if blocked else ["stopped"])
    released.set()
