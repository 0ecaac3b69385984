"""What a load holds beside the model: what `plan` predicts is what `load_hf` takes."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gemma4_moe import load_hf, plan
from gemma4_moe.converter import blocks
from gemma4_moe.converter.preview import predict
from gemma4_moe.errors import ParallelError, UnknownTensorError, UsageError
from gemma4_moe.model_io.sharing import Need, chunks_of
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


def native(tmp_path):
    state = random_hf_state_dict(E=E, H=H, I=I)
    return write_checkpoint(tmp_path / "hf", state), nemo_from_hf(state)


def test_without_strict_tensors_that_the_checkpoint_lacks_keep_their_values_and_are_named(tmp_path):
    source, expected = native(tmp_path)
    model = {name: torch.zeros_like(tensor) for name, tensor in expected.items() if "layers.1." not in name}
    filled = tuple(model)
    model["score.weight"] = torch.full((3, 5), 7.0)
    with pytest.raises(UnknownTensorError, match=r"(?s)score\.weight.*strict=False"):
        load_hf(model, source)
    found = load_hf(model, source, strict=False)
    assert found.filled == filled
    assert found.missing_keys == ("score.weight",)
    assert set(found.unexpected_keys) == expected.keys() - model.keys()
    assert all(torch.equal(model[name], expected[name]) for name in filled)
    assert bool((model["score.weight"] == 7).all())
    with pytest.raises(UnknownTensorError, match="no tensor of the model"):
        load_hf({"score.weight": torch.zeros(3, 5)}, source, strict=False)


def test_progress_ends_at_the_bytes_that_are_read_and_a_directory_has_no_revision(tmp_path):
    source, expected = native(tmp_path)
    seen = []
    found = load_hf(expected, source, progress=lambda *of: seen.append(of))
    assert seen == sorted(seen)
    assert seen[-1] == (found.read_bytes, found.read_bytes)
    with pytest.raises(UsageError, match="no revision"):
        load_hf(expected, source, revision="main")


def test_ranks_on_different_kinds_of_devices_are_refused_by_the_tensors_name():
    needs = [{"a.weight": Need(((0, 4),), 10, device)} for device in ("cpu", "cuda")]
    with pytest.raises(ParallelError, match=r"a\.weight"):
        list(chunks_of(needs))
