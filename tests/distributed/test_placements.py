"""Every placement on 1, 2, 3, 4 and 8 gloo ranks, even and uneven: bits equal the one-process result."""

from __future__ import annotations

import pytest
import torch

from distributed import placement_checks
from support import ranks

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_placements(world: int) -> None:
    ranks.run(world, check_all, world)


def check_all(world: int) -> None:
    for sizes in placement_checks.SIZES:
        placement_checks.check_placements(world, sizes, BF16, BF16)
    placement_checks.check_placements(world, placement_checks.SIZES[1], BF16, FP32)
