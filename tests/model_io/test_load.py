"""What a load holds beside the model: what `plan` predicts is what `load_hf` takes."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gemma4_moe import load_hf, plan
from gemma4_moe.converter import blocks
from gemma4_moe.converter.preview import predict
from support.checkpoints import write_checkpoint
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

E, H, I = 3, 10, 7  # noqa: E741


def most_at_once(load):
    """Return the most bytes that torch's allocator had handed out at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        load()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [64, 10**6])
@pytest.mark.parametrize("beside", [None, (2, 30, 40)])
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # of torch 2.11's profiler
def test_the_prediction_is_what_a_load_takes(
    dtype,
    stored,
    block,
    beside,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    state = {name: tensor.to(stored) for name, tensor in random_hf_state_dict(E=E, H=H, I=I).items()}
    if beside is not None:
        state["model.vision_tower.position_embedding_table"] = torch.rand(beside).to(stored)
    source = write_checkpoint(tmp_path / "hf", state)
    rows = [2 * I * H] + ([30 * 40] if beside else [])  # gate_up of one expert, and a row of what stands beside
    expected = blocks.LOAD_BLOCKS * max(block, *(row * stored.itemsize for row in rows))
    assert predict(plan(source, dtype=dtype).plan, {"ep": 3}).staging_bytes == expected
    model = {name: torch.zeros_like(t) for name, t in nemo_from_hf(state, torch.float32).items()}
    scale = E * stored.itemsize
    assert 0 <= most_at_once(lambda: load_hf(model, source)) - expected <= 2 * scale + 128, "a copy beside the buffer"


def test_rows_at_once_fill_a_block_and_are_at_least_one(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    assert [blocks.rows_at_once(row) for row in (0, 1, 33, 50, 100, 101, 10**9)] == [100, 100, 3, 2, 1, 1, 1]
