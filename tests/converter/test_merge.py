"""`merge`: every form of base and of adapter, both layouts. Expected values are products in fp64, in explicit loops."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemma4_moe import convert, convert_lora, merge, plan, verify
from gemma4_moe.errors import (
    InputError,
    TensorShapeError,
    UnfinishedRunError,
    UnknownTensorError,
    UnsupportedCheckpointError,
    UsageError,
)
from gemma4_moe.target.manifest import read_manifest
from support.adapters import PREFIX, native_config, random_native, scales_of, write_adapter
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import legacy_name, nemo_from_hf
from support.interrupted import counted_writes
from support.models import random_hf_state_dict

E, H, I, R, RANK, ALPHA = 6, 10, 7, 3, 5, 10  # noqa: E741
PATH = "model.language_model.layers."
SCALED = {"moe_rank_scaling": True, "dropout": 0.25}


def base_state(dtype=torch.bfloat16):
    """A base of two layers with the linear modules that the adapter changes, its scales far from one."""
    generator = torch.Generator().manual_seed(12)
    state = random_hf_state_dict(dtype=dtype) | scales_of()
    for layer in (0, 1):
        state[f"{PATH}{layer}.self_attn.q_proj.weight"] = torch.randn(12, H, generator=generator).to(dtype)
        state[f"{PATH}{layer}.mlp.down_proj.weight"] = torch.randn(H, 9, generator=generator).to(dtype)
    return state


def changes(adapter=None, alpha=ALPHA):
    """The exact change of each hf weight beside folded experts, fp64, from NeMo's own tensors."""
    adapter = {name: t.double() for name, t in (adapter or random_native()).items()}
    found = {}
    for layer in (0, 1):
        own = f"{PREFIX}{PATH}{layer}.moe.experts.lora_"
        for weight, stem in (("gate_up_proj", "gate_and_up"), ("down_proj", "down")):
            a, b = (adapter[f"{own}{stem}_{side}"] for side in "AB")
            rank = a.shape[2]
            change = torch.zeros(E, b.shape[2], a.shape[1], dtype=torch.float64)
            for e in range(E):
                for k in range(rank):
                    change[e] += torch.outer(b[e, k], a[e, :, k]) * alpha / rank
            found[f"{PATH}{layer}.experts.{weight}"] = change
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (adapter[f"{PREFIX}{PATH}{layer}.{module}.lora_{side}.weight"] for side in "AB")
            found[f"{PATH}{layer}.{module}.weight"] = b @ a * alpha / len(a)
    return found


def merged(state, change, to="hf"):
    """The exact merged weights in fp64, and those that no change touches as they are."""
    result = dict(state)
    for name, delta in change.items():
        if name.endswith("experts.down_proj"):
            scale = state[name.replace("experts.down_proj", "router.per_expert_scale")].double()[:, None, None]
            result[name] = state[name].double() + delta / scale
        else:
            result[name] = state[name].double() + delta
    return nemo_from_hf_in_fp64(result) if to == "nemo" else result


def nemo_from_hf_in_fp64(state):
    result = {}
    for name, tensor in nemo_from_hf({name: t.float() for name, t in state.items()}).items():
        result[name] = tensor
    for name, tensor in state.items():
        if name.endswith("down_proj") and tensor.ndim == 3:
            scale = state[name.replace("experts.down_proj", "router.per_expert_scale")].double()[:, None, None]
            own = name.replace("experts.down_proj", "moe.experts.down_projs")
            result[own] = (tensor.double() * scale).mT
        elif name.endswith("gate_up_proj"):
            result[name.replace("experts.gate_up_proj", "moe.experts.gate_and_up_projs")] = tensor.double().mT
        elif name in result:
            result[name] = tensor
    return result


def check(directory, expected, dtype):
    """Every tensor is there; changed ones are the exact values to within fp32's rounding, then the dtype's."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype != torch.float64:
            assert torch.equal(found[name], tensor), name
            continue
        assert found[name].dtype == dtype, name
        slack = 3e-6 * (1 + tensor.abs().max())
        low, high = ((tensor + shift).float().to(dtype).double() for shift in (-slack, slack))
        assert ((low <= found[name].double()) & (found[name].double() <= high)).all(), name
        if dtype == torch.bfloat16:  # almost all are the one nearest value
            assert (found[name] == tensor.float().to(dtype)).double().mean() > 0.98, name


@pytest.fixture
def adapter(tmp_path):
    """NeMo's form: experts of another rank than the linear modules."""
    return write_adapter(tmp_path / "native", random_native(), native_config(RANK, ALPHA), SCALED)


@pytest.fixture(params=["nemo", "peft", "legacy", "vllm"])
def any_adapter(request, adapter, tmp_path):
    """The same adapter in each form, converted with the scales of the base."""
    if request.param == "nemo":
        return adapter
    legacy = request.param == "legacy"
    form = "peft" if legacy else request.param
    convert_lora(adapter, tmp_path / form, to=form, base=scales_of(), legacy_layout=legacy)
    return tmp_path / form


@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_form_of_an_adapter_is_merged_into_an_hf_base(any_adapter, dtype, to, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_moe.converter.blocks.BLOCK_BYTES", 300)
    state = base_state(dtype)
    before = contents(write_checkpoint(tmp_path / "base", state))
    done = merge(tmp_path / "base", any_adapter, tmp_path / "merged", to=to)
    check(tmp_path / "merged", merged(state, changes(), to), dtype)
    assert contents(tmp_path / "base") == before
    assert done.plan.target_layout == to
    assert (tmp_path / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_an_adapter_of_nemo_is_merged_into_a_base_in_the_nemo_layout(adapter, to, tmp_path):
    state = base_state(torch.float32)
    convert(write_checkpoint(tmp_path / "base", state), tmp_path / "folded")
    done = merge(tmp_path / "folded", adapter, tmp_path / "merged", to=to)
    expected = merged(state, changes(), "nemo")
    if to == "hf":
        for layer in (0, 1):
            own = f"{PATH}{layer}."
            for hf, native in (("down_proj", "down_projs"), ("gate_up_proj", "gate_and_up_projs")):
                expected[f"{own}experts.{hf}"] = expected.pop(f"{own}moe.experts.{native}").mT
            expected[f"{own}router.per_expert_scale"] = torch.ones(E)
            for rest in ("proj.weight", "scale"):
                expected[f"{own}router.{rest}"] = expected.pop(f"{own}moe.gate.{rest}")
        assert any("every per_expert_scale is one" in note for note in done.notes)
    check(tmp_path / "merged", expected, torch.float32)


def test_without_the_scales_of_a_folded_base_an_adapter_of_unfolded_weights_is_refused(adapter, tmp_path):
    convert(write_checkpoint(tmp_path / "base", base_state()), tmp_path / "folded")
    convert_lora(adapter, tmp_path / "peft", to="peft", base=scales_of())
    with pytest.raises(UsageError, match="folded") as caught:
        merge(tmp_path / "folded", tmp_path / "peft", tmp_path / "merged")
    assert "gemma4-moe lora" in caught.value.hint
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize("spelling", ["legacy", "per-expert"])
def test_a_base_in_another_form_is_written_in_the_current_one(adapter, spelling, to, tmp_path):
    state, spelled = base_state(torch.float32), {}
    for name, tensor in state.items():
        if spelling == "legacy":
            spelled[legacy_name(name)] = tensor
        elif name.endswith("experts.gate_up_proj"):
            for e in range(E):
                stem = name.replace("gate_up_proj", f"{e}.")
                spelled[f"{stem}gate_proj.weight"], spelled[f"{stem}up_proj.weight"] = tensor[e, :I], tensor[e, I:]
        elif name.endswith("experts.down_proj"):
            spelled |= {name.replace("down_proj", f"{e}.down_proj.weight"): tensor[e] for e in range(E)}
        else:
            spelled[name] = tensor
    write_checkpoint(tmp_path / "base", spelled, config_of(state))
    merge(tmp_path / "base", adapter, tmp_path / "merged", to=to)
    check(tmp_path / "merged", merged(state, changes(), to), torch.float32)
    assert verify(tmp_path / "base", tmp_path / "merged", adapter=adapter).different == ()


def test_a_cast_is_rounded_once_from_the_fp32_sum(adapter, tmp_path):
    state = base_state(torch.float32)
    write_checkpoint(tmp_path / "base", state)
    merge(tmp_path / "base", adapter, tmp_path / "merged", dtype="bfloat16")
    exact = merged(state, changes())
    found = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(path)
    for name in changes():
        assert (found[name] == exact[name].float().to(torch.bfloat16)).double().mean() > 0.99
    name = f"{PATH}0.experts.gate_up_proj"
    twice = (state[name].bfloat16().double() + changes()[name]).float().bfloat16()
    assert (found[name] == twice).double().mean() < 0.9, "the base's values were rounded before the sum"


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    state = base_state(torch.float32)
    native = write_adapter(tmp_path / "n", random_native(rank=R), native_config(R, ALPHA), {})
    convert_lora(native, tmp_path / "peft", to="peft", base=scales_of())
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    (tmp_path / "peft" / "automodel_peft_config.json").unlink()
    write_checkpoint(tmp_path / "base", state)
    merge(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    wider = {name: change * R**0.5 for name, change in changes(random_native(rank=R)).items()}
    check(tmp_path / "merged", merged(state, wider), torch.float32)


def test_notes_name_the_norm_of_each_layer_and_experts_that_do_not_change(tmp_path):
    state, own = base_state(), random_native()
    own[f"{PREFIX}{PATH}1.moe.experts.lora_down_B"][2] = 0
    own[f"{PREFIX}{PATH}1.moe.experts.lora_down_A"][4] = 0
    write_adapter(tmp_path / "native", own, native_config(RANK, ALPHA), SCALED)
    write_checkpoint(tmp_path / "base", state)
    done = merge(tmp_path / "base", tmp_path / "native", tmp_path / "merged")
    exact = merged(state, changes(own))
    for layer in (0, 1):
        square = sum(
            (exact[name] - state[name].double()).square().sum() for name in changes(own) if f".{layer}." in name
        )
        assert any(f"{PATH}{layer} {square**0.5:.3g}" in note for note in done.notes), done.notes
    assert any(f"experts 2, 4 of {PATH}1.experts.down_proj" in note for note in done.notes)
    assert sum("changes nothing" in note for note in done.notes) == 3  # and each layer's router, whose B is zero
    found = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        found |= load_file(path)
    name = f"{PATH}1.experts.down_proj"
    for expert in (2, 4):
        assert torch.equal(found[name][expert].view(torch.int16), state[name][expert].view(torch.int16))


REFUSED = [
    (
        {f"{PREFIX}{PATH}1.self_attn.k_proj.lora_{s}.weight": torch.ones(3, 3) for s in "AB"},
        {},
        UnknownTensorError,
        "k_proj",
    ),
    ({f"{PREFIX}{PATH}1.self_attn.q_proj.lora_B.weight": torch.ones(11, RANK)}, {}, TensorShapeError, "q_proj"),
    ({}, {"use_dora": True}, UnsupportedCheckpointError, "DoRA"),
    ({f"{PREFIX}{PATH}0.moe.experts.lora_down_A": torch.full((E, I, R), np.nan)}, {}, InputError, "not finite"),
]


@pytest.mark.parametrize(("tensors", "config", "error", "match"), REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tensors, config, error, match, tmp_path):
    write_adapter(tmp_path / "a", random_native() | tensors, native_config(RANK, ALPHA) | config, SCALED)
    write_checkpoint(tmp_path / "base", base_state())
    with pytest.raises(error, match=match):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_scale_of_zero_by_which_b_is_divided_is_refused(adapter, tmp_path):
    state = base_state()
    state[f"{PATH}1.router.per_expert_scale"][3] = 0
    write_checkpoint(tmp_path / "base", state)
    with pytest.raises(InputError, match="can be divided"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_an_interrupted_merge_is_resumed_and_a_complete_one_is_known(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4_moe.converter.blocks.BLOCK_BYTES", 300)
    write_checkpoint(tmp_path / "base", base_state())
    arguments = (tmp_path / "base", adapter, tmp_path / "merged")
    merge(tmp_path / "base", adapter, tmp_path / "whole")
    with counted_writes() as every:
        merge(tmp_path / "base", adapter, tmp_path / "again")
    monkeypatch.setattr("gemma4_moe.target.journal.FLUSH_BYTES", 1000)
    with counted_writes(stop_after=sum(every) // 2), pytest.raises(KeyboardInterrupt):
        merge(*arguments)
    with pytest.raises(UnfinishedRunError, match="not finished") as caught:
        merge(*arguments, dtype="float32", resume=True)
    assert "gemma4-moe merge" in caught.value.hint
    with counted_writes() as rest:
        merge(*arguments, resume=True)
    assert sum(rest) < sum(every) * 2 / 3
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    before = (tmp_path / "merged").stat().st_ino
    merge(*arguments, resume=True)
    assert (tmp_path / "merged").stat().st_ino == before
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 11}))
    with pytest.raises(UsageError):
        merge(*arguments, resume=True)


def test_the_plan_and_the_manifest_name_the_adapter(adapter, tmp_path):
    write_checkpoint(tmp_path / "base", base_state())
    found = plan(tmp_path / "base", tmp_path / "merged", to="hf", adapter=adapter)
    assert found.plan.changes.keys() >= {f"{PATH}0.experts.down_proj", f"{PATH}1.self_attn.q_proj.weight"}
    assert any("the adapter changes 2" in note for note in found.notes)
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert set(read_manifest(tmp_path / "merged")["options"]["adapter"]) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "automodel_peft_config.json",
    }


def test_memory_for_the_matrices_is_within_the_budget(adapter, tmp_path):
    write_checkpoint(tmp_path / "base", base_state())
    whole = plan(tmp_path / "base", to="hf", adapter=adapter)
    assert whole.memory.change_bytes >= 2 * 4 * E * R * (2 * I + H)
    with pytest.raises(UsageError, match="memory budget") as caught:
        merge(tmp_path / "base", adapter, tmp_path / "merged", max_memory=whole.memory.change_bytes)
    assert "--max-memory" in caught.value.hint
