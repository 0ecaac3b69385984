"""Blocks in flight: one at a time in each step, no more than there are buffers, and one failure that stops all."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from gemma4_moe.converter.blocks import Memory
from gemma4_moe.converter.steps import run


@dataclass
class Counting:
    """Steps that pass numbers through and remember what they saw. Blocks are numbers."""

    fail_at: tuple[str, int] = ("", -1)
    error: BaseException | None = None
    slow: str = ""
    read_order: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)
    most_in_a_step: int = 0
    most_in_flight: int = 0

    @contextmanager
    def step(self, step, block):
        self.inside[step] += 1
        self.most_in_a_step = max(self.most_in_a_step, self.inside[step])
        if step == self.slow:
            time.sleep(0.002)
        if self.error and (step, block) == self.fail_at:
            raise self.error
        yield
        self.inside[step] -= 1

    def read(self, block, buffer):
        with self.step("read", block):
            self.read_order.append(block)
            self.most_in_flight = max(self.most_in_flight, len(self.read_order) - len(self.written))
            buffer[0] = block % 256
            return buffer[:1]

    def compute(self, block, read, buffer):
        with self.step("compute", block):
            buffer[0] = read[0]
            return -block

    def digest(self, block, buffer, facts):
        with self.step("digest", block):
            return buffer[0] + 1000, facts

    def write(self, block, buffer, piece):
        with self.step("write", block):
            assert (buffer[0], piece) == (block % 256, (block % 256 + 1000, -block))
            self.written.append(block)


@pytest.mark.parametrize("buffers", [1, 2, 4])
@pytest.mark.parametrize("slow", ["", "read", "compute", "write"])
def test_blocks_are_read_in_order_and_buffers_keep_their_number(buffers, slow):
    steps = Counting(slow=slow)
    run(range(60), steps, Memory(4096, buffers))
    assert steps.read_order == list(range(60))
    assert sorted(steps.written) == list(range(60))
    assert steps.most_in_flight <= buffers
    assert steps.most_in_a_step == 1


def test_a_slow_step_does_not_keep_the_others_from_working():
    both = threading.Barrier(2, timeout=20)

    class Meeting(Counting):
        @contextmanager
        def step(self, step, block):
            if (step, block) in (("write", 0), ("read", 1)):
                both.wait()
            yield

    run(range(2), Meeting(), Memory(4096, 2))


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt("the disk is gone")], ids=repr)
@pytest.mark.parametrize("step", ["read", "compute", "digest", "write"])
@pytest.mark.parametrize("block", [0, 7, 59])
def test_a_failure_or_an_interrupt_is_the_one_that_is_raised(step, block, error):
    steps = Counting(fail_at=(step, block), error=error)
    for _ in range(20):
        with pytest.raises(type(error), match="the disk is gone"):
            run(range(60), steps, Memory(4096, 2))
    assert block not in steps.written


def test_no_blocks_are_no_work():
    run([], Counting(), Memory(4096, 1))
