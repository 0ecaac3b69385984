"""What a load holds beside the model: what `plan` predicts is what `load_hf` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma4_moe import load_hf, plan
from gemma4_moe.converter import blocks
from gemma4_moe.converter.preview import predict
from support.checkpoints import write_checkpoint
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from pathlib import Path

E, H, I = 3, 10, 7  # noqa: E741


def allocated_by_a_load(model: dict[str, torch.Tensor], source: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes in bytes of the raw buffers that `load_hf` makes."""
    taken, empty = [], torch.empty

    def watched(*shape: Any, **how: Any) -> torch.Tensor:
        made = empty(*shape, **how)
        if how.get("dtype") is torch.uint8:
            taken.append(made.nbytes)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", watched)
        load_hf(model, source)
    return taken


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [64, 10**6])
@pytest.mark.parametrize("beside", [None, (2, 30, 40)])
def test_the_prediction_is_what_a_load_takes(
    dtype: str,
    stored: torch.dtype,
    block: int,
    beside: tuple[int, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    state = {name: tensor.to(stored) for name, tensor in random_hf_state_dict(E=E, H=H, I=I).items()}
    if beside is not None:
        state["model.vision_tower.position_embedding_table"] = torch.rand(beside).to(stored)
    source = write_checkpoint(tmp_path / "hf", state)
    rows = [2 * I * H] + ([30 * 40] if beside else [])  # gate_up of one expert, and a row of what stands beside
    expected = max(block, *(row * stored.itemsize for row in rows))
    assert predict(plan(source, dtype=dtype).plan, {"ep": 3}).staging_bytes == expected
    model = {name: torch.zeros_like(t) for name, t in nemo_from_hf(state, torch.float32).items()}
    assert allocated_by_a_load(model, source, monkeypatch) == [expected]


def test_rows_at_once_fill_a_block_and_are_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    assert [blocks.rows_at_once(row) for row in (0, 1, 33, 50, 100, 101, 10**9)] == [100, 100, 3, 2, 1, 1, 1]
