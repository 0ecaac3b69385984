"""Loads that share their reads: on any ranks the bits of one process, each byte read once, failures told to all."""

import pytest

from distributed import io_checks, sharing_checks
from support import ranks
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict

E, H, I = io_checks.E, io_checks.H, io_checks.I  # noqa: E741


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    state = random_hf_state_dict(E=E, H=H, I=I, layers=2)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", state)


@pytest.fixture
def own_source(tmp_path):
    """A checkpoint that a test may break."""
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict(E=E, H=H, I=I, layers=2))


@pytest.fixture(scope="module")
def sizes():
    return {name: tensor.nbytes for name, tensor in random_hf_state_dict(E=E, H=H, I=I, layers=2).items()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_placement_has_one_processs_bits_and_each_byte_is_read_once(world, source, sizes):
    ranks.run(world, sharing_checks.check_every_placement, world, source, sizes)


def test_ranks_that_shard_an_inner_axis_read_no_more_than_their_share(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(E=64, H=16, I=12, layers=2))
    ranks.run(4, sharing_checks.check_inner_shards_read_their_share, 4, source)


def test_each_group_reads_each_byte_once(source, sizes):
    ranks.run(4, sharing_checks.check_groups, source, sizes)


def test_pipeline_stages_share_the_tensors_that_both_have(source):
    ranks.run(2, sharing_checks.check_stages, source)


def test_memory_is_that_of_the_blocks_on_their_way(source):
    scales = 2 * E * 2
    ranks.run(2, sharing_checks.check_memory, source, scales + 100_000)


def test_a_rank_whose_disk_fails_is_named_on_all_others(source):
    ranks.run(3, sharing_checks.check_a_rank_whose_disk_fails, source, 3)


def test_a_file_that_is_cut_off_or_written_ends_all_ranks(own_source):
    ranks.run(2, sharing_checks.check_a_changing_file, own_source)
    ranks.run(2, sharing_checks.check_a_truncated_file, own_source)


def test_a_rank_that_is_killed_ends_all_others(source):
    ranks.run(3, sharing_checks.check_a_killed_rank, source, meet_at_end=False, seconds=90)


def test_ctrl_c_on_one_rank_ends_the_others(source):
    ranks.run(2, sharing_checks.check_interrupt, source, meet_at_end=False, seconds=90)


def test_ranks_that_disagree_fail_together_and_can_go_on(source, tmp_path):
    other = write_checkpoint(tmp_path / "hf", random_hf_state_dict(E=E, H=H, I=I, layers=2), files=1)
    ranks.run(2, sharing_checks.check_disagreements, source, other)
