"""Every placement on 1, 2, 3, 4 and 8 gloo ranks, even and uneven: bits equal the one-process result."""

from __future__ import annotations

import pytest

from distributed import placement_checks
from support import ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_placements(world: int) -> None:
    ranks.run(world, placement_checks.check_all, world)
