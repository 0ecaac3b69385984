"""Indices that a rank holds and a range have in common, counted one by one."""

import itertools

import pytest

from gemma4_moe.distributed.sharding import overlaps


@pytest.mark.parametrize("runs", [(range(10),), (range(2, 5), range(7, 9)), (range(6, 9), range(1, 3)), ()])
def test_overlaps_give_each_common_index_its_position(runs):
    held = [index for run in runs for index in run]
    for start, end in itertools.combinations_with_replacement(range(11), 2):
        found = {}
        for positions, indices in overlaps(runs, start, end):
            assert indices
            found |= dict(zip(indices, range(positions.start, positions.stop), strict=True))
        assert found == {index: held.index(index) for index in held if start <= index < end}
