"""Odd values are found by every command that reads them, counted as NumPy counts them, and folded over layers."""

import json
import re

import numpy as np
import pytest
import torch

from gemma4_moe import convert, inspect, verify
from gemma4_moe.checkpoint import values
from gemma4_moe.checkpoint.values import Oddities, is_document, unusual_scales, value_notes
from gemma4_moe.cli import commands
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.layout.dtypes import BY_NAME
from gemma4_moe.target.manifest import read_manifest
from support.checkpoints import config_of, write_checkpoint
from support.formulas import nemo_from_hf
from support.interrupted import counted_writes
from support.models import random_hf_state_dict

PATH = "model.language_model.layers."
NAN, INF = float("nan"), float("inf")


def damaged(dtype=torch.bfloat16):
    state = random_hf_state_dict(layers=3, E=6, H=40, I=24, dtype=dtype)
    for layer in (0, 2):
        state[f"{PATH}{layer}.experts.gate_up_proj"][1, 2, 3:6] = torch.tensor([NAN, -INF, INF])
        state[f"{PATH}{layer}.experts.down_proj"][4] = -0.0
    state[f"{PATH}1.mlp.down_proj.weight"][0, :2] = torch.tensor([-NAN, INF])
    state[f"{PATH}1.experts.down_proj"][5] = state[f"{PATH}1.experts.down_proj"][2]
    state[f"{PATH}1.experts.gate_up_proj"][0] = state[f"{PATH}1.experts.gate_up_proj"][3]
    state[f"{PATH}1.experts.gate_up_proj"][0, 1, 1] += 1  # equal in most places, and not equal
    state[f"{PATH}2.router.per_expert_scale"][:3] = torch.tensor([0.0, -1.5, INF])
    return state


def expected_notes(state):
    """The facts of the notes, counted by torch."""
    gate = [f"{PATH}{layer}.experts.gate_up_proj" for layer in (0, 2)]
    return {
        (f"{PATH}2.router.per_expert_scale", "1 infinite and 1 zero and 1 negative of 6"),
        (f"{PATH}{{0,2}}.experts.gate_up_proj", f"{sum(int(state[n].isnan().sum()) for n in gate)} values are NaN"),
        (
            f"{PATH}{{0,2}}.experts.gate_up_proj",
            f"{sum(int(state[n].isinf().sum()) for n in gate)} values are infinite",
        ),
        (f"{PATH}1.mlp.down_proj.weight", "1 value is NaN"),
        (f"{PATH}1.mlp.down_proj.weight", "1 value is infinite"),
        (f"{PATH}{{0,2}}.experts.down_proj", "2 experts are all zero, 4, in 2 tensors"),
        (f"{PATH}1.experts.down_proj", "2 experts are equal to another, 2, 5"),
    }


def assert_told(notes, expected):
    for name, fact in expected:
        assert [note for note in notes if note.startswith(f"{name}: ") and fact in note], (name, fact, notes)
    assert len(notes) == len(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convert_verify_and_inspect_tell_the_same(dtype, tmp_path, small_blocks):
    state = damaged(dtype)
    source = write_checkpoint(tmp_path / "hf", state)
    done = convert(source, tmp_path / "nemo")
    assert_told(done.notes, expected_notes(state))
    assert verify(source, tmp_path / "nemo").notes == done.notes
    assert set(done.notes) <= set(inspect(source, values=True).notes)
    assert not set(done.notes) & set(inspect(source).notes)
    again = convert(source, tmp_path / "nemo", resume=True)
    assert again.notes == done.notes
    of_values = [note for note in done.notes if "per_expert_scale has" not in note]
    assert list(verify(tmp_path / "nemo").notes) == of_values


def test_from_nemo_too_and_an_expert_of_zeros_is_not_equal_to_another(tmp_path):
    state = random_hf_state_dict()
    state[f"{PATH}1.experts.down_proj"][3:] = 0
    source = write_checkpoint(tmp_path / "nemo", nemo_from_hf(state), config_of(state))
    notes = [note for note in convert(source, tmp_path / "hf").notes if "--base" not in note]
    assert_told(notes, {(f"{PATH}1.moe.experts.down_projs", "3 experts are all zero, 3, 4, 5")})


def test_an_interrupted_run_tells_what_its_earlier_blocks_had(tmp_path, small_blocks):
    state = damaged()
    source = write_checkpoint(tmp_path / "hf", state)
    runs = 0
    while not (tmp_path / "nemo").exists():
        runs += 1
        try:
            with counted_writes(stop_after=20_000):
                done = convert(source, tmp_path / "nemo", resume=True)
        except KeyboardInterrupt:
            assert runs < 30
    assert runs > 2
    assert_told(done.notes, expected_notes(state))


@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_healthy_models_give_no_note(kind, dtype, tmp_path):
    save_model(build_model(kind, dtype=dtype), tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "nemo").notes == ()
    assert verify(tmp_path / "hf", tmp_path / "nemo").notes == ()
    found = inspect(tmp_path / "hf", values=True)
    assert (found.notes, found.problems) == ((), ())
    back = convert(tmp_path / "nemo", tmp_path / "back").notes
    assert len(back) == 1
    assert "--base" in back[0]


def test_healthy_experts_in_fp32_beside_bf16_and_of_another_number_give_no_note(tmp_path):
    state = random_hf_state_dict(E=9, layers=3)
    state = {name: t.float() if "experts." in name else t for name, t in state.items()}
    source = write_checkpoint(tmp_path / "hf", state)
    assert convert(source, tmp_path / "nemo").notes == ()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("seed", range(4))
def test_bits_of_every_kind_are_counted_as_numpy_counts_them(name, seed):
    dtype = BY_NAME[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, 6 * 10_007 * dtype.itemsize, np.uint8)
    numbers = raw.view(dtype.numpy())
    numbers[5::997] = [np.inf, -np.inf, np.nan][seed % 3]
    odd, hashed = Oddities(), bytearray()
    odd.scan("a", raw.data, dtype, (0, 6), hashed.extend)
    with np.errstate(invalid="ignore"):
        assert odd.nan.get("a", 0) == np.count_nonzero(np.isnan(numbers))
        assert odd.infinite.get("a", 0) == np.count_nonzero(np.isinf(numbers))
    assert bytes(hashed) == raw.tobytes()
    assert odd.zero == {}
    assert len(odd.samples["a"]) == 6


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_of_either_sign_are_zero_and_a_subnormal_is_not(value):
    experts = np.full((3, 70_000), value, np.float32)
    experts[1, 69_999] = -1e-45
    odd = Oddities()
    odd.scan("a", experts.view(np.uint8).reshape(-1).data, BY_NAME["float32"], (7, 10))
    assert odd.zero == {"a": [7, 9]}


def test_dtypes_without_such_values_are_hashed_and_not_looked_at():
    odd, hashed = Oddities(), bytearray()
    odd.scan("a", memoryview(b"\xff" * 64), BY_NAME["int8"], (0, 4), hashed.extend)
    assert odd.document() == {}
    assert len(hashed) == 64


@pytest.mark.parametrize(
    "document", [None, [], {"nan": 3}, {"nan": {"a": "3"}}, {"zero": {"a": [True]}}, {"equal": {"a": [1]}}, {"b": {}}]
)
def test_a_manifest_with_senseless_values_is_not_believed(document, source, tmp_path):
    assert not is_document(document)
    convert(source, tmp_path / "nemo")
    manifest = read_manifest(tmp_path / "nemo") | {"values": document}
    (tmp_path / "nemo" / "gemma4_moe.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "nemo").notes == ()


def test_notes_of_many_are_short():
    experts = list(range(100))
    (zero, equal) = value_notes({"zero": {"a": experts}, "equal": {"b": [experts]}}, {})
    assert zero == "a: 100 experts are all zero, 0, 1, 2, 3, 4, 5, 6, 7 and others"
    assert equal.startswith("b: 100 experts are equal to another, 0, 1, 2")
    scales = {f"layers.{n}.s": np.array([1, -2, 3], np.float32) for n in range(3)}
    assert unusual_scales(scales) == (
        "layers.{0...2}.s: per_expert_scale has 3 negative of 9 values, folded as they are",
    )


def test_the_commands_print_the_notes(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "hf", damaged())
    for words in (["convert", source, tmp_path / "nemo"], ["verify", source, tmp_path / "nemo"]):
        with pytest.raises(SystemExit) as ended:
            commands.main(list(map(str, words)))
        assert ended.value.code == 0
        assert "experts.gate_up_proj: 2 values are NaN" in re.sub(r"\s+", " ", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        commands.main(["inspect", str(source), "--values"])
    assert "2 values are NaN" in capsys.readouterr().out


def test_experts_beyond_one_piece_are_scanned_whole(monkeypatch):
    monkeypatch.setattr(values, "_PIECE", 64)
    experts = np.ones((2, 1000), np.float16)
    experts[1, 999] = -np.inf
    odd = Oddities()
    odd.scan("a", experts.view(np.uint8).reshape(-1).data, BY_NAME["float16"], (0, 2))
    assert odd.infinite == {"a": 1}
