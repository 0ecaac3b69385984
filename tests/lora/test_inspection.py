"""`inspect` and `diff` on adapters: what is shown, and which differences are found."""

import json
import shutil

import pytest
import torch

from gemma4_moe import convert_lora, diff
from gemma4_moe.errors import UnsupportedCheckpointError
from gemma4_moe.lora.inspection import inspect_adapter
from support.adapters import PREFIX, native_config, random_native, scales_of, write_adapter
from support.command import run

E, H, I, R, RANK, ALPHA = 6, 10, 7, 3, 5, 10  # noqa: E741
LAYERS = "model.language_model.layers."
DOWN_B = f"{PREFIX}{LAYERS}1.moe.experts.lora_down_B"


@pytest.fixture
def native(tmp_path):
    return write_adapter(tmp_path / "native", random_native(), native_config(), {"moe_rank_scaling": True})


def test_it_shows_each_weight_with_rank_scaling_and_shape(native):
    found = inspect_adapter(native)
    rows = {row.name: row for row in found.folds}
    experts = rows["model.language_model.layers.{0...1}.experts.down_proj"]
    assert (experts.rank, experts.scaling, experts.shape, experts.weights) == (R, ALPHA / R, (E, H, I), 2)
    linear = rows["model.language_model.layers.{0...1}.self_attn.q_proj"]
    assert (linear.rank, linear.scaling, linear.shape, linear.dtype) == (RANK, 2.0, (12, H), "float32")
    assert (found.form, found.layout, found.experts, found.needs_scale) == ("nemo", None, E, True)
    assert (found.tensors, found.bytes) == (20, sum(t.nbytes for t in random_native().values()))
    assert found.notes == ()


def test_with_values_it_notes_the_norm_of_each_layer(native):
    own, square = random_native(), 0
    for stem in ("gate_and_up", "down"):
        a, b = (own[f"{PREFIX}{LAYERS}0.moe.experts.lora_{stem}_{side}"].double() for side in "AB")
        square += (a @ b * ALPHA / R).square().sum()
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (own[f"{PREFIX}{LAYERS}0.{module}.lora_{side}.weight"].double() for side in "AB")
        square += (b @ a * ALPHA / RANK).square().sum()
    found = inspect_adapter(native, values=True)
    assert any(f"{LAYERS}0 {square**0.5:.3g}" in note for note in found.notes)


def test_the_command_shows_the_same(native, tmp_path):
    convert_lora(native, tmp_path / "peft", to="peft", base=scales_of())
    found = json.loads(run("inspect", tmp_path / "peft", "--format", "json").stdout)
    assert (found["form"], found["layout"], found["tensors"], found["needs_scale"]) == ("peft", "peft-0.19.1", 20, True)
    assert {row["rank"] for row in found["folds"]} == {R, RANK}
    assert "experts.gate_up_proj" in run("inspect", native).stdout
    assert "norm of the change" in run("inspect", native, "--values").stdout


def test_an_adapter_equals_itself_and_each_difference_is_named(native, tmp_path):
    assert diff(native, native).different == ()
    other = random_native()
    other[DOWN_B][4, 2, 7] += 1
    del other[f"{PREFIX}{LAYERS}0.self_attn.q_proj.lora_A.weight"]
    del other[f"{PREFIX}{LAYERS}0.self_attn.q_proj.lora_B.weight"]
    write_adapter(tmp_path / "other", other, native_config(), {"moe_rank_scaling": True})
    found = diff(native, tmp_path / "other")
    assert sorted((each.kind, each.name) for each in found.different) == [
        ("missing", f"{PREFIX}{LAYERS}0.self_attn.q_proj.lora_A.weight"),
        ("missing", f"{PREFIX}{LAYERS}0.self_attn.q_proj.lora_B.weight"),
        ("values", DOWN_B),
    ]
    assert next(each for each in found.different if each.kind == "values").index == (4, 2, 7)
    run("diff", native, tmp_path / "other", status=4)


def test_another_scaling_is_a_difference_though_every_bit_is_equal(native, tmp_path):
    shutil.copytree(native, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(native_config(alpha=20)))
    found = diff(native, tmp_path / "other")
    assert {(each.kind, each.expected, each.found) for each in found.different} == {
        ("scaling", "2", "4"),
        ("scaling", "3.33333", "6.66667"),
    }
    assert found.different_tensors == 0
    assert "scaling" in run("diff", native, tmp_path / "other", status=4).stdout


def test_adapters_of_different_forms_are_refused_with_the_command_that_helps(native, tmp_path):
    convert_lora(native, tmp_path / "peft", to="peft", base=scales_of())
    with pytest.raises(UnsupportedCheckpointError, match="different forms") as caught:
        diff(native, tmp_path / "peft")
    assert "gemma4-moe lora" in caught.value.hint
    assert "--to nemo" in caught.value.hint


def test_values_that_are_not_finite_are_noted(native, tmp_path):
    state = random_native()
    state[DOWN_B][0, 0, 0] = torch.nan
    write_adapter(tmp_path / "odd", state, native_config(), {"moe_rank_scaling": True})
    found = diff(tmp_path / "odd", tmp_path / "odd")
    assert found.different == ()
    assert any("NaN" in note for note in found.notes)
