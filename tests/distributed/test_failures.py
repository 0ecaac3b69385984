"""Nothing hangs: ranks that disagree fail together, and a lost rank is noticed."""

from __future__ import annotations

from distributed import failure_checks
from support import ranks


def test_ranks_that_disagree_fail_together() -> None:
    ranks.run(4, failure_checks.disagree, 4)
    ranks.run(2, failure_checks.disagree_on_arguments, 2)


def test_a_rank_that_stays_away_is_not_waited_for_forever() -> None:
    ranks.run(2, failure_checks.stay_away, 2, meet_at_end=False)


def test_a_killed_rank_ends_the_others() -> None:
    ranks.run(3, failure_checks.die, 3, meet_at_end=False, seconds=90)


def test_placements_and_meshes_that_are_not_known_are_refused() -> None:
    ranks.run(2, failure_checks.refuse_partial, 2)
    ranks.run(2, failure_checks.refuse_unknown_mesh, 2)


def test_an_outer_pipeline_dimension_is_cut_away() -> None:
    ranks.run(4, failure_checks.cut_pipeline_away, 4)
