"""Ranks that convert one checkpoint together: the same bytes for 1, 2 and 4, one failure stops all, torchrun works."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

from gemma4_moe import convert
from gemma4_moe.converter import blocks
from gemma4_moe.errors import ParallelError, StorageError
from gemma4_moe.target import directory, journal
from gemma4_moe.target.recovery import remains
from support import ranks
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.interrupted import counted_writes
from support.models import random_hf_state_dict, read_directory

OPTIONS = {"max_shard_size": 60_000, "max_memory": 70_000}


def fail_on_the_last(source, target):
    world, rank = dist.get_world_size(), dist.get_rank()

    def fill_the_disk(done, total):
        if rank == world - 1 and done > total // 4:
            raise StorageError("no space left, says the test")

    with pytest.raises(StorageError if rank == world - 1 else ParallelError, match=r"no space|rank 1 could not"):
        convert_small(source, target, progress=fill_the_disk)


def convert_small(source, target, **options):
    blocks.BLOCK_BYTES = journal.FLUSH_BYTES = 8192
    convert(source, target, **OPTIONS | options)


def convert_on_all(source, target):
    with counted_writes() as written:
        convert_small(source, target)
    tensors = 2 * 6 * 3 * 32 * 64 * 2 + 5000  # two layers of experts, and a little of everything else
    assert sum(written) <= tensors / dist.get_world_size() + blocks.BLOCK_BYTES, "a rank has done more than its share"


resume_on_all = partial(convert_small, resume=True)


def find_one_other_byte(source, target):
    """In one piece of a file after the other: they are shared among the ranks, and the one that finds it tells all."""
    copy_files = directory.copy_files
    for position in range(4100, 6 * 8192, 8192):

        def flip(paths, out, position=position):
            flip_bit(max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size), position)
            return copy_files(paths, out)

        directory.copy_files = flip
        with pytest.raises((StorageError, ParallelError), match=r"other bytes than were written|could not read back"):
            resume_on_all(source, target)
        assert not target.exists()
        dist.barrier()


@pytest.fixture
def source(tmp_path):
    """Experts of whole pages: ranks share a file where a page begins."""
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=2, E=6, H=64, I=32))


@pytest.fixture
def alone(source, tmp_path):
    ranks.run(1, convert_on_all, source, tmp_path / "alone")
    return contents(tmp_path / "alone")


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(world, source, alone, tmp_path):
    ranks.run(world, convert_on_all, source, tmp_path / "together")
    assert contents(tmp_path / "together") == alone
    assert remains(tmp_path / "together") is None


def test_one_failure_stops_all_and_any_number_of_ranks_can_go_on(source, alone, tmp_path):
    ranks.run(2, fail_on_the_last, source, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
    left = remains(tmp_path / "nemo")
    assert left is not None
    assert left.command is not None
    ranks.run(4, resume_on_all, source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == alone
    assert remains(tmp_path / "nemo") is None


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_judge_the_experts_of_the_way_back_together(world, source, tmp_path):
    convert(source, tmp_path / "nemo", dtype="float32")
    with_base = partial(convert_small, base=source)
    ranks.run(1, with_base, tmp_path / "nemo", tmp_path / "alone")
    ranks.run(world, with_base, tmp_path / "nemo", tmp_path / "together")
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    back, state = read_directory(tmp_path / "together"), read_directory(source)
    assert all(torch.equal(back[name], state[name].float()) for name in state)


def test_ranks_count_together_what_becomes_infinite(tmp_path):
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24, dtype=torch.float32)
    for name, tensor in state.items():
        if "gate_up" in name:
            tensor[:, ::3] *= 1e6
    source = write_checkpoint(tmp_path / "hf", state)
    for world, target in ((1, "alone"), (3, "together")):
        ranks.run(world, partial(convert_small, dtype="float16"), source, tmp_path / target)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert len(json.loads((tmp_path / "alone/gemma4_moe.json").read_text())["overflowed"]) == 2


def test_ranks_read_back_every_piece_between_them(source, alone, tmp_path):
    assert max(path.stat().st_size for path in (tmp_path / "alone").iterdir()) > 5 * 8192 + 4100
    ranks.run(2, find_one_other_byte, source, tmp_path / "nemo")
    ranks.run(2, resume_on_all, source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == alone


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gemma4_moe", "convert", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_under_torchrun_rank_0_speaks_for_all(source, tmp_path):
    done = torchrun(source, tmp_path / "nemo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("target ") == 1
    convert(source, tmp_path / "alone")
    assert contents(tmp_path / "nemo") == contents(tmp_path / "alone")
    refused = torchrun(source, tmp_path / "nemo")
    assert refused.returncode == 1
    assert refused.stderr.count("gemma4-moe: error: the target exists") == 1
