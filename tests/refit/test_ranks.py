"""The stream over 2 and 4 gloo ranks: the same names, order and bits as in one process, on every rank or on one."""

from __future__ import annotations

import pytest

from refit import rank_checks
from support import ranks


@pytest.mark.parametrize("world", [2, 4])
def test_every_placement_gives_the_same_stream(world: int) -> None:
    ranks.run(world, rank_checks.check_streams, world)


def test_ranks_that_disagree_fail_together() -> None:
    ranks.run(2, rank_checks.check_disagreement)
