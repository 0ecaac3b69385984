"""torch.distributed.checkpoint with our directories and our destinations, at several meshes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from distributed import dcp_checks
from gemma4_moe import convert
from support import ranks
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("world", [1, 3, 4])
def test_dcp_fills_models_from_both_layouts(world: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    convert(source, tmp_path / "nemo")
    ranks.run(world, dcp_checks.check_dcp, world, source, tmp_path / "nemo")
