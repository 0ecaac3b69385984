"""Adapters between the three forms: names, axes, scales, ranks. Expected values are explicit formulas in torch."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma4_moe import convert_lora
from gemma4_moe.errors import (
    ConfigError,
    IncompleteExpertsError,
    InputError,
    TensorShapeError,
    UnknownTensorError,
    UnsupportedCheckpointError,
    UsageError,
)
from support.adapters import PREFIX, native_config, random_native, scales_of, write_adapter
from support.checkpoints import contents, write_checkpoint
from support.models import random_hf_state_dict

E, H, I, R, RANK = 6, 10, 7, 3, 5  # noqa: E741
LAYER = f"{PREFIX}model.language_model.layers."
SCALED = {"moe_rank_scaling": True, "dropout": 0.25, "dropout_position": "post"}


@pytest.fixture
def native(tmp_path):
    return write_adapter(tmp_path / "native", random_native(), native_config(), SCALED)


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def config(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def peft_delta(state, layer, config, layout="current"):
    """The change of each expert weight [E, out, in] by PEFT's own rule, per expert and rank in a loop."""
    changes = {}
    for parameter, stem in (("gate_up_proj", "experts.base_layer."), ("down_proj", "experts.")):
        rank = config["rank_pattern"].get(f"model.language_model.layers.{layer}.experts.{parameter}", config["r"])
        a, b = (state[f"{LAYER}{layer}.{stem}lora_{side}.weight"] for side in "AB")
        change = torch.zeros(E, b.shape[0], a.shape[1])
        for e in range(E):
            for k in range(rank):
                change[e] += torch.outer(b[:, k * E + e], a[e * rank + k])
        if layout == "legacy":  # it took [E, out, in] for [E, in, out]
            change = change.mT
        changes[parameter] = change * config["lora_alpha"] / rank
    return changes


def native_delta(state, layer, alpha=10, r=R):
    own = f"{LAYER}{layer}.moe.experts.lora_"
    return {
        "gate_up_proj": torch.bmm(state[f"{own}gate_and_up_A"], state[f"{own}gate_and_up_B"]).mT * alpha / r,
        "down_proj": torch.bmm(state[f"{own}down_A"], state[f"{own}down_B"]).mT * alpha / r,
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_to_peft_the_change_is_the_native_one_divided_by_the_scale(native, tmp_path, legacy):
    scales = scales_of()
    done = convert_lora(native, tmp_path / "peft", to="peft", base=scales, legacy_layout=legacy)
    state, said = weights(tmp_path / "peft"), config(tmp_path / "peft")
    for layer in (0, 1):
        scale = scales[f"model.language_model.layers.{layer}.router.per_expert_scale"][:, None, None]
        expected = native_delta(random_native(), layer)
        found = peft_delta(state, layer, said, "legacy" if legacy else "current")
        assert torch.allclose(found["gate_up_proj"], expected["gate_up_proj"], rtol=1e-5, atol=1e-5)
        assert torch.allclose(found["down_proj"] * scale, expected["down_proj"], rtol=1e-5, atol=1e-5)
        assert (found["down_proj"] - expected["down_proj"]).abs().max() > 1e-2, "a scale that is lost would not be seen"
    assert (done.modules, done.tensors, done.source_form, done.form) == (10, 20, "nemo", "peft")
    assert set(contents(tmp_path / "peft")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "automodel_peft_config.json",
        "gemma4_moe.json",
    }


def test_to_peft_the_documents_say_ranks_targets_versions_and_keep_dropout_in_nemos_own(native, tmp_path):
    convert_lora(native, tmp_path / "peft", to="peft", base=scales_of())
    said = config(tmp_path / "peft")
    experts = [f"model.language_model.layers.{n}.experts.{p}" for n in (0, 1) for p in ("down_proj", "gate_up_proj")]
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (RANK, 10, 0)
    assert said["rank_pattern"] == dict.fromkeys(experts, R)
    assert sorted(said["target_parameters"]) == sorted(experts)
    assert "model.language_model.layers.1.router.proj" in said["target_modules"]
    assert not [name for name in said["target_modules"] if "moe" in name]
    assert said["peft_version"] == "0.19.1"
    own = json.loads((tmp_path / "peft" / "automodel_peft_config.json").read_text())
    assert own == SCALED | {"paramwrapper_layout": "peft-0.19.1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_there_and_back_all_is_bit_equal_but_b_of_down_within_one_ulp(tmp_path, form, dtype):
    state = random_native(dtype=dtype, rank=R)
    write_adapter(tmp_path / "a", state, native_config(R, 7), {"dropout": 0.5})
    convert_lora(tmp_path / "a", tmp_path / "b", to=form, base=scales_of())
    convert_lora(tmp_path / "b", tmp_path / "c", to="nemo", base=scales_of())
    back = weights(tmp_path / "c")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name.endswith("lora_down_B"):
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert (back[name].view(bits).int() - tensor.view(bits).int()).abs().max() <= 1, name
        else:
            assert torch.equal(back[name], tensor), name
    said = config(tmp_path / "c")
    assert (said["r"], said["lora_alpha"]) == (R, 7)


def test_scales_that_are_powers_of_two_leave_every_bit(tmp_path, native):
    scales = {name: 2.0 ** torch.arange(-2, 4) for name in scales_of()}
    convert_lora(native, tmp_path / "b", to="peft", base=scales)
    convert_lora(tmp_path / "b", tmp_path / "c", to="nemo", base=scales)
    back = weights(tmp_path / "c")
    assert all(torch.equal(back[name], tensor) for name, tensor in random_native().items())
    own = json.loads((tmp_path / "c" / "automodel_peft_config.json").read_text())
    assert own == SCALED


def test_to_vllm_each_expert_has_its_matrices_and_ratios_of_scalings_are_in_b(native, tmp_path):
    scales = scales_of()
    done = convert_lora(native, tmp_path / "vllm", to="vllm", base=scales)
    found, said = weights(tmp_path / "vllm"), config(tmp_path / "vllm")
    shared = said["lora_alpha"] / said["r"]
    assert (said["r"], shared) == (RANK, 10 / RANK)
    for layer in (0, 1):
        expected, own = native_delta(random_native(), layer), f"{LAYER}{layer}.experts."
        scale = scales[f"model.language_model.layers.{layer}.router.per_expert_scale"]
        for e in range(E):
            pairs = {
                p: [found[f"{own}{e}.{p}.lora_{side}.weight"] for side in "BA"]
                for p in ("gate_proj", "up_proj", "down_proj")
            }
            change = {p: (b @ a) * shared for p, (b, a) in pairs.items()}
            both = torch.cat([change["gate_proj"], change["up_proj"]])
            assert torch.allclose(both, expected["gate_up_proj"][e], rtol=1e-4, atol=1e-5)
            assert torch.allclose(change["down_proj"] * scale[e], expected["down_proj"][e], rtol=1e-4, atol=1e-5)
            assert pairs["down_proj"][1].shape == (R, I)
    assert len(found) == 2 * (6 + E * 6)
    assert any("ratio of scalings" in note for note in done.notes)


def test_peft_to_vllm_and_between_its_own_layouts_asks_for_no_base_and_keeps_every_bit(native, tmp_path):
    convert_lora(native, tmp_path / "new", to="peft", base=scales_of())
    convert_lora(tmp_path / "new", tmp_path / "old", to="peft", legacy_layout=True)
    convert_lora(tmp_path / "old", tmp_path / "again", to="peft")
    first, again = weights(tmp_path / "new"), weights(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    old = weights(tmp_path / "old")
    assert old[f"{LAYER}0.experts.lora_A.weight"].shape == (R * E, H)
    convert_lora(tmp_path / "old", tmp_path / "vllm", to="vllm")


def test_the_scales_of_a_directory_are_read_whatever_its_dtype(native, tmp_path):
    base = random_hf_state_dict(E=E, H=H, I=I)
    write_checkpoint(tmp_path / "base", base)
    convert_lora(native, tmp_path / "a", to="peft", base=tmp_path / "base")
    convert_lora(native, tmp_path / "b", to="peft", base={n: t for n, t in base.items() if n.endswith("_scale")})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rslora_becomes_nemos_alpha_and_its_dropout(tmp_path):
    native = random_native(rank=R)
    write_adapter(tmp_path / "a", native, native_config(R, 6))
    convert_lora(tmp_path / "a", tmp_path / "b", to="peft", base=scales_of())
    said = config(tmp_path / "b") | {"use_rslora": True, "lora_alpha": 2.0}
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(said))
    convert_lora(tmp_path / "b", tmp_path / "c", to="nemo", base=scales_of())
    assert config(tmp_path / "c")["lora_alpha"] / R == pytest.approx(2 / 3**0.5, rel=1e-12)


def test_a_router_that_nemo_has_not_applied_is_noted(tmp_path):
    state = random_native()
    name = f"{LAYER}1.moe.gate.proj.lora_B.weight"
    write_adapter(tmp_path / "a", state | {name: torch.ones(E, RANK)}, native_config(), SCALED)
    done = convert_lora(tmp_path / "a", tmp_path / "b", to="peft", base=scales_of())
    assert len(done.notes) == 1
    assert "layers.1.router.proj" in done.notes[0]


def test_linear_modules_alone_need_no_base(tmp_path):
    state = {name: tensor for name, tensor in random_native().items() if "experts" not in name}
    write_adapter(tmp_path / "a", state, native_config(), {"dropout": 0.125})
    convert_lora(tmp_path / "a", tmp_path / "b", to="peft")
    assert config(tmp_path / "b")["lora_dropout"] == 0.125
    assert "target_parameters" not in config(tmp_path / "b")
    assert {n.replace("moe.gate", "router") for n in state} == weights(tmp_path / "b").keys()


def test_gate_up_alone_is_wrapped_once(tmp_path, native):
    state = {name: tensor for name, tensor in random_native().items() if "lora_down" not in name}
    write_adapter(tmp_path / "a", state, native_config(), SCALED)
    convert_lora(tmp_path / "a", tmp_path / "b", to="peft")
    found = weights(tmp_path / "b")
    assert found[f"{LAYER}0.experts.lora_A.weight"].shape == (R * E, H)
    convert_lora(tmp_path / "b", tmp_path / "c", to="vllm")
    with pytest.raises(UnsupportedCheckpointError, match=r"(?s)NeMo's form.*gate_up and down"):
        convert_lora(tmp_path / "b", tmp_path / "d", to="nemo")


def changed(**documents):
    return native_config() | documents


NAME = f"{LAYER}0.moe.experts.lora_down_B"
REFUSED = {
    "no base": ({}, {}, None, UsageError, "--base"),
    "a zero scale": ({}, {}, {n: t * torch.tensor([1, 1, 0, 1, 1, 1.0]) for n, t in scales_of().items()}, InputError, "expert 2"),
    "a scale that is NaN": ({}, {}, {n: t / 0 * 0 for n, t in scales_of().items()}, InputError, "expert 0"),
    "too few scales": ({}, {}, {n: t[:-1] for n, t in scales_of().items()}, TensorShapeError, "another number of experts"),
    "another layer's": ({}, {}, scales_of(layers=(0,)), UsageError, "layers.1"),
    "another prefix's": ({}, {}, scales_of(path="model."), UsageError, "no scale for a layer"),
    "no scale's name": ({}, {}, {"scale": np.ones(E)}, UsageError, "not the name"),
    "DoRA by its config": ({}, {"use_dora": True}, scales_of(), UnsupportedCheckpointError, "DoRA"),
    "DoRA by a name": ({f"{LAYER}0.mlp.down_proj.lora_magnitude_vector.weight": torch.ones(H)}, {}, scales_of(), UnsupportedCheckpointError, "DoRA"),
    "biases": ({}, {"bias": "lora_only"}, scales_of(), UnsupportedCheckpointError, "biases"),
    "modules to save": ({}, {"modules_to_save": ["lm_head"]}, scales_of(), UnsupportedCheckpointError, "modules_to_save"),
    "a base that was changed": ({}, {"init_lora_weights": "pissa_niter_4"}, scales_of(), UnsupportedCheckpointError, "pissa"),
    "another method": ({}, {"peft_type": "IA3"}, scales_of(), UnsupportedCheckpointError, "IA3"),
    "no rank": ({}, {"r": None}, scales_of(), ConfigError, "r in adapter_config"),
    "an unknown name": ({f"{LAYER}0.moe.experts.lora_up_A": torch.ones(E, H, R)}, {}, scales_of(), UnknownTensorError, "lora_up_A"),
    "an expert under moe": ({f"{LAYER}0.moe.experts.0.up_proj.lora_A.weight": torch.ones(R, H)}, {}, scales_of(), UnknownTensorError, "no form"),
    "two forms": ({f"{LAYER}0.experts.lora_A.weight": torch.ones(R * E, I)}, {}, scales_of(), UnknownTensorError, "two forms"),
    "a rank that differs": ({NAME: torch.ones(E, R + 1, H)}, {}, scales_of(), TensorShapeError, "r = 3"),
    "a hidden size that differs": ({NAME: torch.ones(E, R, H + 1)}, {}, scales_of(), TensorShapeError, "H = 10"),
    "experts that differ": ({f"{LAYER}1.moe.experts.lora_down_{s}": torch.ones(E + 1, n, m) for s, n, m in (("A", I, R), ("B", R, H))}, {}, scales_of(), TensorShapeError, "E = 6"),
    "no B": ({NAME: None}, {}, scales_of(), IncompleteExpertsError, "lora_B"),
    "integers": ({NAME: torch.ones(E, R, H, dtype=torch.int8)}, {}, scales_of(), TensorShapeError, "int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_and_nothing_is_written(tmp_path, case):
    tensors, documents, base, error, said = REFUSED[case]
    state = {name: tensor for name, tensor in (random_native() | tensors).items() if tensor is not None}
    write_adapter(tmp_path / "a", state, changed(**documents), SCALED)
    with pytest.raises(error, match=said) as raised:
        convert_lora(tmp_path / "a", tmp_path / "b", to="peft", base=base)
    assert raised.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_stamp_that_the_shapes_rule_out_is_refused_and_none_is_needed_where_they_tell(native, tmp_path):
    convert_lora(native, tmp_path / "b", to="peft", base=scales_of())
    (tmp_path / "b" / "automodel_peft_config.json").unlink()
    said = config(tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(said | {"peft_version": "0.18.0"}))
    with pytest.raises(ConfigError, match="shapes and stamp"):
        convert_lora(tmp_path / "b", tmp_path / "c", to="vllm")
    del said["peft_version"]
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(said))
    convert_lora(tmp_path / "b", tmp_path / "c", to="vllm")


def test_gate_and_up_with_two_inputs_are_refused(native, tmp_path):
    convert_lora(native, tmp_path / "b", to="vllm", base=scales_of())
    state = weights(tmp_path / "b")
    state[f"{LAYER}0.experts.2.up_proj.lora_A.weight"][0, 0] += 1
    write_adapter(tmp_path / "c", state, config(tmp_path / "b"))
    with pytest.raises(UnsupportedCheckpointError, match="A of their own"):
        convert_lora(tmp_path / "c", tmp_path / "d", to="peft")


def test_ranks_that_nemo_can_not_say_are_refused(native, tmp_path):
    convert_lora(native, tmp_path / "b", to="peft", base=scales_of())
    (tmp_path / "b" / "automodel_peft_config.json").unlink()
    with pytest.raises(UnsupportedCheckpointError, match="moe_rank_scaling"):
        convert_lora(tmp_path / "b", tmp_path / "c", to="nemo", base=scales_of())


def test_a_form_that_it_has_already_and_a_form_that_is_none_are_refused(native, tmp_path):
    for form, said in (("nemo", "already"), ("gguf", "no such form")):
        with pytest.raises(UsageError, match=said):
            convert_lora(native, tmp_path / "b", to=form)


def test_a_directory_without_an_adapter_names_where_it_is(native, tmp_path):
    (tmp_path / "step").mkdir()
    native.rename(tmp_path / "step" / "model")
    with pytest.raises(InputError, match=r"step/model"):
        convert_lora(tmp_path / "step", tmp_path / "b", to="peft")
