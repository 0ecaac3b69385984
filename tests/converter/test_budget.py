"""`--max-memory`: every buffer that a conversion has at any time is counted, and their sum stays within the budget."""

import gc
import mmap
import threading
from types import SimpleNamespace

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint import readers
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter import blocks as block_module
from gemma4_moe.converter.blocks import MOST_BUFFERS, blocks, plan_memory
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.errors import UsageError
from gemma4_moe.target import journal
from support.checkpoints import write_checkpoint
from support.interrupted import interrupt
from support.models import random_hf_state_dict

LEAST = 24_576  # two buffers of a page each, with the pages around what is asked for


class Taken:
    """The bytes of buffers that are alive, and the most that were at once."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()
        taken = self

        class Counted(mmap.mmap):
            def __new__(cls, descriptor, length):
                taken.add(length)
                return super().__new__(cls, descriptor, length)

            def __del__(self):
                taken.add(-len(self))

        self.mmap = Counted

    def add(self, nbytes):
        with self.lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


@pytest.fixture
def taken(monkeypatch):
    taken = Taken()
    monkeypatch.setattr(readers, "mmap", SimpleNamespace(mmap=taken.mmap))
    return taken


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(block_module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(journal, "FLUSH_BYTES", 8192)


@pytest.mark.parametrize("budget", [LEAST, 60_000, 100_000, 2**20])
@pytest.mark.parametrize("buffered", [False, True])
def test_all_buffers_of_a_conversion_stay_within_the_budget(budget, buffered, source, tmp_path, taken):
    room = budget + 12_288 if budget == LEAST else budget  # an expert of the base, with the pages around it
    for one, other, memory, options in (
        ("hf", "nemo", budget, {"max_shard_size": 60_000}),
        ("nemo", "back", budget, {}),
        ("nemo", "again", room, {"base": source}),
    ):
        taken.most = 0
        done = convert(tmp_path / one, tmp_path / other, max_memory=memory, buffered=buffered, **options)
        assert done.memory.peak_bytes <= taken.most <= memory
        assert taken.now == 0, "a buffer outlives its conversion"
        assert bool(done.memory.base_bytes) == ("base" in options)


def test_what_is_hashed_before_resuming_stays_within_the_budget(source, tmp_path, taken):
    interrupt(source, tmp_path / "nemo")
    gc.collect()  # the interrupt's trace
    assert taken.now == 0
    taken.most = 0
    convert(source, tmp_path / "nemo", max_memory=LEAST, max_shard_size=60_000, resume=True)
    assert LEAST // 2 < taken.most <= LEAST


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Experts of 0.4 MB and of 0.8 MB, 12 of each, in blocks of two and of one."""
    monkeypatch.setattr(block_module, "BLOCK_BYTES", 10**6)
    state = random_hf_state_dict(layers=1, E=12, H=480, I=416)
    with open_checkpoint(write_checkpoint(tmp_path / "large", state)) as checkpoint:
        return make_plan(checkpoint)


@pytest.mark.parametrize("budget", [2**21, 3 * 10**6, 2**23, 2**25, 2**30])
def test_a_budget_is_used_and_not_exceeded(budget, large):
    memory = plan_memory(large, budget)
    assert memory.peak_bytes <= budget
    assert 1 <= memory.buffers <= MOST_BUFFERS
    assert memory.buffers == MOST_BUFFERS or memory.peak_bytes + 2 * memory.buffer_bytes > budget
    work = list(blocks(large))
    assert {(block.last - block.first) for block in work if "down_projs" in block.tensor.name} == {2}
    assert {(block.last - block.first) for block in work if "gate_and_up" in block.tensor.name} == {1}
    most = max(max(block.end - block.start, *(read.end - read.start for read in block.reads())) for block in work)
    assert most == 2 * 2 * 416 * 480 == 798_720
    assert most + readers.SLACK <= memory.buffer_bytes <= most + 2 * readers.SLACK


def test_one_block_that_does_not_fit_is_said_before_anything_is_written(large):
    with pytest.raises(UsageError, match="smaller than one block") as caught:
        plan_memory(large, 10**6)
    asked = caught.value.facts["expected"].split()[2]
    assert 2 * 798_720 <= int(asked) < 1.1 * 2 * 798_720
    assert plan_memory(large, int(asked)).buffers == 1
