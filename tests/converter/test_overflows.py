"""`convert --dtype`: values that become infinite are counted and said, and so are tensors that keep their dtype."""

import numpy as np
import pytest
import torch

from gemma4_moe import convert, plan
from gemma4_moe.converter import steps
from gemma4_moe.converter.steps import can_overflow, count_overflows
from gemma4_moe.layout import dtypes
from gemma4_moe.target.manifest import read_manifest
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.formulas import nemo_from_hf
from support.interrupted import counted_writes
from support.models import random_hf_state_dict

COUNT = 6000


@pytest.fixture
def values():
    """Every third value is beyond fp16's range, every fifth was never finite."""
    values = np.random.default_rng(7).standard_normal(COUNT).astype(np.float32)
    values[::3] *= 1e6
    values[values == 0] = 1
    values[::5] = [np.inf, -np.inf, np.nan] * (COUNT // 15)
    return values


def counted_in_turn(values):
    return sum(1 for value in values.tolist() if np.isfinite(value) and abs(value) >= 65_520)  # infinite in fp16


@pytest.mark.parametrize("piece", [2**20, 1000, 7])
@pytest.mark.parametrize("shape", [(COUNT,), (3, 50, 40)])
def test_finite_values_that_became_infinite_are_counted(shape, piece, values, monkeypatch):
    monkeypatch.setattr(steps, "_PIECE", piece)
    shaped = values.reshape(shape)
    with np.errstate(over="ignore"):
        result = shaped.astype(np.float16)
        exchanged = np.ascontiguousarray(result.swapaxes(-1, -2)) if len(shape) > 1 else result
    assert counted_in_turn(values) > 100
    assert count_overflows(shaped, result) == counted_in_turn(values)
    if len(shape) > 1:
        assert count_overflows(shaped.swapaxes(1, 2), exchanged) == counted_in_turn(values)
    assert count_overflows(shaped[:0], result[:0]) == 0


def test_a_dtype_overflows_where_its_largest_value_is_smaller():
    floats = [dtypes.FLOAT32, dtypes.BFLOAT16, dtypes.FLOAT16]
    for old in floats:
        for new in floats:
            largest = float(np.finfo(np.float32).max) if old is dtypes.FLOAT32 else 3.3895e38
            largest = 65_504.0 if old is dtypes.FLOAT16 else largest
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(np.float32(largest).astype(new.numpy())))
            assert can_overflow(old, new) != fits, (old.name, new.name)


PATH = "model.language_model.layers."


@pytest.fixture
def state():
    """Finite values beyond fp16's range in experts of both kinds and elsewhere, and others that are no news."""
    state = random_hf_state_dict(layers=3, E=6, H=40, I=24, dtype=torch.float32)
    for layer in range(3):
        state[f"{PATH}{layer}.experts.gate_up_proj"][layer:, 7, ::5] *= 1e6
        state[f"{PATH}{layer}.router.per_expert_scale"][4] = 1e5
        state[f"{PATH}{layer}.router.proj.weight"][1] = -70_000 if layer else 65_519  # the latter rounds to 65,504
        state[f"{PATH}{layer}.router.scale"][:3] = torch.tensor([float("inf"), float("nan"), -float("inf")])
        state[f"{PATH}{layer}.experts.down_proj"][2, 3, :2] = torch.tensor([float("nan"), float("inf")])
    return state


def counted(state, dtype):
    """The finite values that the fold in fp32 has, and that are infinite in `dtype`, of each native tensor."""
    wide, narrow = nemo_from_hf(state), nemo_from_hf(state, dtype)
    counts = {name: int((wide[name].isfinite() & narrow[name].to(dtype).isinf()).sum()) for name in wide}
    return {name: count for name, count in counts.items() if count}


def test_finite_values_that_become_infinite_are_counted(state, tmp_path):
    done = convert(write_checkpoint(tmp_path / "hf", state), tmp_path / "nemo", dtype="float16")
    expected = counted(state, torch.float16)
    assert len(expected) == 8
    assert read_manifest(tmp_path / "nemo")["overflowed"] == expected
    for group, count in (
        (f"{PATH}{{0...2}}.moe.experts.gate_and_up_projs", sum(n for k, n in expected.items() if "gate_and" in k)),
        (f"{PATH}{{0...2}}.moe.experts.down_projs", sum(n for k, n in expected.items() if "down" in k)),
        (f"{PATH}{{1...2}}.moe.gate.proj.weight", 80),
    ):
        assert [note for note in done.notes if f" {group} " in note and note.startswith(f"{count:,} finite ")], group


def test_the_same_on_the_way_back_and_in_bf16(tmp_path):
    state = random_hf_state_dict(dtype=torch.float32)
    name = f"{PATH}1.experts.gate_up_proj"
    state[name][1, 2, 3:5] = torch.tensor([3.4e38, 3.38e38])  # bfloat16 ends at 3.3895e38
    convert(write_checkpoint(tmp_path / "hf", state), tmp_path / "nemo")
    assert read_manifest(tmp_path / "nemo")["overflowed"] == {}
    done = convert(tmp_path / "nemo", tmp_path / "back", dtype="bfloat16")
    assert read_manifest(tmp_path / "back")["overflowed"] == {name: 1}
    assert any(note.startswith(f"1 finite value of {name} ") for note in done.notes)


@pytest.mark.parametrize("budget", [32_768, 60_000])
def test_blocks_and_resuming_do_not_show_in_the_counts(budget, state, tmp_path, small_blocks):
    source = write_checkpoint(tmp_path / "hf", state)
    whole = convert(source, tmp_path / "whole", dtype="float16")
    runs = 0
    while not (tmp_path / "nemo").exists():
        runs += 1
        try:
            with counted_writes(stop_after=20_000):
                done = convert(source, tmp_path / "nemo", dtype="float16", max_memory=budget, resume=True)
        except KeyboardInterrupt:
            assert runs < 20
            file = next((tmp_path / ".nemo.gemma4-moe/out").glob("*.safetensors"))
            flip_bit(file, 4096 * (runs + 2))  # a block that has to be made again, with its count
    assert runs > 2
    assert contents(tmp_path / "nemo") == contents(tmp_path / "whole")
    assert done.notes == whole.notes
    again = convert(source, tmp_path / "nemo", dtype="float16", resume=True)
    assert again.notes == whole.notes


def test_tensors_that_keep_their_dtype_are_named(tmp_path):
    state = random_hf_state_dict(layers=3, dtype=torch.float32)
    state["model.position_ids"] = torch.arange(5)
    for layer in range(3):
        state[f"{PATH}{layer}.self_attn.inv_freq"] = torch.rand(4, dtype=torch.float64)
    source = write_checkpoint(tmp_path / "hf", state)
    done = convert(source, tmp_path / "nemo", dtype="bfloat16")
    left = [note for note in done.notes if "keep" in note]
    assert left == [
        f"3 tensors {PATH}{{0...2}}.self_attn.inv_freq keep float64: --dtype casts no such tensors",
        "1 tensor model.position_ids keeps int64: --dtype casts no such tensors",
    ]
    assert set(left) <= set(plan(source, dtype="bfloat16").notes)
    assert convert(source, tmp_path / "kept").notes == ()
