"""The four threads: order, buffers that never exceed their number, and one failure or interrupt that stops all."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from gemma4_moe.converter.blocks import Memory
from gemma4_moe.converter.pipeline import run


@dataclass
class Counting:
    """Steps that pass numbers through and remember what they saw. Blocks are numbers."""

    fail_at: tuple[str, int] = ("", -1)
    error: BaseException = field(default_factory=lambda: OSError("the disk is gone"))
    slow: str = ""
    written: list[int] = field(default_factory=list)
    threads: dict[str, set[int]] = field(default_factory=dict)
    reading: int = 0
    most_ahead: int = 0

    def seen(self, step: str, block: int) -> None:
        self.threads.setdefault(step, set()).add(threading.get_ident())
        if step == self.slow:
            time.sleep(0.002)
        if (step, block) == self.fail_at:
            raise self.error

    def read(self, block: Any, buffer: memoryview) -> memoryview:
        self.reading += 1
        self.most_ahead = max(self.most_ahead, self.reading - len(self.written))
        self.seen("read", block)
        buffer[0] = block % 256
        return buffer[:1]

    def compute(self, block: Any, read: memoryview, buffer: memoryview) -> int:
        self.seen("compute", block)
        buffer[0] = read[0]
        return -block

    def digest(self, block: Any, buffer: memoryview, facts: int) -> tuple[int, int]:
        self.seen("digest", block)
        return buffer[0] + 1000, facts

    def write(self, block: Any, buffer: memoryview, piece: tuple[int, int]) -> None:
        self.seen("write", block)
        assert (buffer[0], piece) == (block % 256, (block % 256 + 1000, -block))
        self.written.append(block)


@pytest.mark.parametrize("buffers", [1, 2, 4])
@pytest.mark.parametrize("slow", ["", "read", "compute", "write"])
def test_blocks_keep_their_order_and_buffers_their_number(buffers: int, slow: str) -> None:
    steps = Counting(slow=slow)
    run(range(60), steps, Memory(4096, buffers))  # type: ignore[arg-type]
    assert steps.written == list(range(60))
    assert steps.most_ahead <= 2 * buffers + 1
    assert all(len(ids) == 1 for ids in steps.threads.values())
    assert len(set().union(*steps.threads.values())) == 4


@pytest.mark.parametrize("step", ["read", "compute", "digest", "write"])
@pytest.mark.parametrize("block", [0, 7, 59])
def test_a_failure_is_the_one_that_is_raised(step: str, block: int) -> None:
    steps = Counting(fail_at=(step, block))
    for _ in range(20):
        with pytest.raises(OSError, match="the disk is gone"):
            run(range(60), steps, Memory(4096, 2))  # type: ignore[arg-type]
    assert block not in steps.written


def test_an_interrupt_in_a_step_is_raised_too() -> None:
    steps = Counting(fail_at=("write", 3), error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(range(60), steps, Memory(4096, 2))  # type: ignore[arg-type]


def test_no_blocks_are_no_work() -> None:
    run([], Counting(), Memory(4096, 1))
