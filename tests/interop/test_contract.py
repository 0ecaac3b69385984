"""The contract of the class, as frameworks and NeMo AutoModel's own tests use it: ours and NeMo's give the same."""

from unittest.mock import Mock

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter, WeightStream
from gemma4_moe.errors import IncompleteExpertsError, UsageError
from support import peer
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict

E, H, I = 6, 10, 7  # noqa: E741
BF16, FP32 = torch.bfloat16, torch.float32
PREFIX = "model.language_model.layers."


def ours(dtype=FP32):
    return Gemma4MoEStateDictAdapter(Mock(), Mock(n_routed_experts=E), Mock(), dtype=dtype)


def theirs(dtype=FP32):
    return peer.adapter_class()(Mock(), Mock(n_routed_experts=E), Mock(), dtype=dtype)


both = pytest.mark.parametrize("make", [ours, theirs])


@pytest.fixture
def hf():
    return random_hf_state_dict(layers=2, E=E, H=H, I=I, dtype=BF16)


@pytest.fixture
def nemo(hf):
    return nemo_from_hf(hf, FP32)


@both
def test_names_there_and_back(make, hf, nemo):
    assert set(make().from_hf(dict(hf))) == set(nemo)
    assert set(make().to_hf(dict(nemo))) == set(hf)


@both
def test_values_to_hf(make, nemo):
    assert_same_tensors(make().to_hf(dict(nemo)), hf_from_nemo(nemo))


@both
@pytest.mark.parametrize("role", ["experts.gate_up_proj", "experts.down_proj", "router.per_expert_scale"])
def test_a_layer_that_lacks_a_tensor_is_incomplete(make, role, hf):
    del hf[f"{PREFIX}1.{role}"]
    with pytest.raises(RuntimeError, match="Incomplete expert weights"):
        make().from_hf(hf)


@both
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
def test_only_experts_are_cast(make, dtype, hf):
    found = make(dtype).from_hf(dict(hf))
    experts = {name for name in found if ".moe.experts." in name}
    assert len(experts) == 4
    assert {found[name].dtype for name in experts} == {dtype}
    assert {tensor.dtype for name, tensor in found.items() if name not in experts} == {BF16}


@both
def test_router_tensors_and_all_others_are_the_same_objects_whatever_their_shape(make, hf, nemo):
    odd = torch.ones(3)
    name, native = f"{PREFIX}0.router.proj.weight", f"{PREFIX}0.moe.gate.proj.weight"
    assert make().from_hf(hf | {name: odd})[native] is odd
    assert make().to_hf(nemo | {native: odd})[name] is odd
    other = f"{PREFIX}1.input_layernorm.weight"
    assert make().from_hf(dict(hf))[other] is hf[other]
    assert make().convert_single_tensor_to_hf(native, odd)[0][1] is odd


@both
@pytest.mark.parametrize(
    ("regex", "dropped"),
    [
        (r".*router.*", {"router.proj.weight", "router.scale", "router.per_expert_scale"}),
        (r".*experts\.gate_up_proj", {"experts.gate_up_proj"}),
        (r"router", set()),  # anchored at the start
        (r".*_extra_state.*", set()),
    ],
)
def test_to_hf_leaves_out_hf_names_that_match_from_their_start(make, regex, dropped, nemo, hf):
    kept = set(make().to_hf(dict(nemo), exclude_key_regex=regex))
    assert kept == {name for name in hf if not any(name.endswith(ending) for ending in dropped)}


def test_native_names_drop_router_keys_of_a_single_tensor(nemo):
    for make in (ours, theirs):
        for name, tensor in nemo.items():
            found = make().convert_single_tensor_to_hf(name, tensor, exclude_key_regex=r".*moe\.gate.*")
            assert bool(found) == (".moe.gate." not in name)


@both
def test_a_single_tensor(make, nemo):
    expected = hf_from_nemo(nemo)
    found = [pair for name, tensor in nemo.items() for pair in make().convert_single_tensor_to_hf(name, tensor)]
    assert_same_tensors(dict(found), expected)
    assert len(found) == len(expected)
    down = make().convert_single_tensor_to_hf(
        f"{PREFIX}1.moe.experts.down_projs", nemo[f"{PREFIX}1.moe.experts.down_projs"]
    )
    assert [name for name, _ in down] == [f"{PREFIX}1.experts.down_proj", f"{PREFIX}1.router.per_expert_scale"]
    assert torch.equal(down[1][1], torch.ones(E))


@both
def test_arguments_that_only_others_need_are_taken(make, hf, nemo):
    make().from_hf(dict(hf), device_mesh=None, target_dtype=None)
    make().to_hf(dict(nemo), exclude_key_regex=None, quantization=False, device_mesh=None, v4_compatible=False)
    make().convert_single_tensor_to_hf("a.weight", torch.ones(2), quantization=False, device_mesh=None)


@both
def test_attributes_that_frameworks_read(make, nemo):
    adapter = make()
    assert adapter._supports_low_memory_dcp_load is True
    assert adapter.supports_low_memory_dcp_load is True
    assert sorted(adapter.get_hf_state_dict_keys(nemo)) == sorted(hf_from_nemo(nemo))
    assert adapter.map_peft_target_module_to_hf(f"{PREFIX}0.mlp.up_proj") == f"{PREFIX}0.mlp.up_proj"
    adapter._paramwrapper_layout_hint = "modern"
    assert adapter.dtype == FP32


def test_what_is_excluded_is_not_checked(nemo):
    adapter = ours()
    name = f"{PREFIX}1.moe.experts.gate_and_up_projs"
    odd = {
        name: torch.ones(2, 3),  # its shape
        f"{PREFIX}0.moe.experts.unknown": torch.ones(2),  # its name
        f"{PREFIX}0.moe.experts.lora_down_A": torch.ones(2),
        f"{PREFIX}0.moe.gate.proj.weight": object(),  # its type
    }
    regex = r".*(layers\.1\.experts\.gate_up_proj|unknown|lora_|moe\.gate\.proj)"
    expected = {
        hf: tensor
        for hf, tensor in hf_from_nemo(nemo).items()
        if hf
        not in (f"{PREFIX}1.experts.gate_up_proj", f"{PREFIX}0.router.proj.weight", f"{PREFIX}1.router.proj.weight")
    }
    assert_same_tensors(adapter.to_hf(nemo | odd, exclude_key_regex=regex), expected)
    for each, value in odd.items():
        assert adapter.convert_single_tensor_to_hf(each, value, exclude_key_regex=regex) == []


def test_an_excluded_tensor_may_be_absent(nemo):
    absent = f"{PREFIX}1.moe.experts.down_projs"
    there = {name: tensor for name, tensor in nemo.items() if name != absent}
    regex = r".*layers\.1\.moe\.experts\.down_projs"
    expected = ours().to_hf(nemo, exclude_key_regex=regex)
    assert_same_tensors(ours().to_hf(there, exclude_key_regex=regex), expected)
    assert [p.name for p in WeightStream(there, ours(), exclude_key_regex=regex).plan()] == sorted(expected)
    with pytest.raises(IncompleteExpertsError, match="down missing"):
        ours().to_hf(there)


def test_quantised_output_is_refused_and_a_load_is_not(nemo):
    with pytest.raises(UsageError, match="quantised hf output is not supported"):
        ours().to_hf(nemo, quantization=True)
    plain = ours().to_hf(nemo, for_checkpoint_load=True)
    asked = ours().to_hf(nemo, quantization=True, for_checkpoint_load=True)
    assert {name: (t.shape, t.dtype, t.stride()) for name, t in plain.items()} == {
        name: (t.shape, t.dtype, t.stride()) for name, t in asked.items()
    }


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", BF16])
def test_a_dtype_may_be_given_by_name(name, hf):
    assert ours(name).dtype == BF16
    assert_same_tensors(ours(name).from_hf(hf), nemo_from_hf(hf, BF16))


@pytest.mark.parametrize("name", ["bf16", "float64", None, 2])
def test_another_dtype_is_refused_when_the_adapter_is_made(name):
    with pytest.raises(UsageError, match="no dtype for expert tensors"):
        ours(name)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "", "base_model.model.model.language_model."])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_magnitude"])
def test_lora_of_the_router_moves_with_its_module_and_all_other_lora_passes(prefix, part):
    native = {
        f"{prefix}layers.1.moe.gate.proj.{part}": torch.ones(3, H),
        f"{prefix}layers.1.self_attn.q_proj.{part}": torch.ones(3, H),
        f"{prefix}layers.1.mlp.down_proj.{part}": torch.ones(3, 4),
    }
    names = [name.replace("moe.gate", "router") for name in native]
    adapter = ours()
    found = adapter.to_hf(native)
    assert list(found) == names == adapter.get_hf_state_dict_keys(native)
    assert all(found[name] is native[old] for name, old in zip(names, native, strict=True))
    back = adapter.from_hf(found)
    assert list(back) == list(native)
    assert list(adapter.from_hf(native)) == list(native)  # as NeMo's own adapter saves them
    for (name, tensor), hf in zip(native.items(), names, strict=True):
        assert adapter.convert_single_tensor_to_hf(name, tensor) == [(hf, tensor)]


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "", "base_model.model.model.language_model."])
def test_nemos_lora_of_experts_passes_both_ways_as_it_is(prefix):
    stem = f"{prefix}layers.1.moe.experts.lora_"
    native = {
        f"{stem}gate_and_up_A": torch.ones(E, H, 3),
        f"{stem}gate_and_up_B": torch.ones(E, 3, 2 * I),
        f"{stem}down_A": torch.ones(E, I, 3),
        f"{stem}down_B": torch.ones(E, 3, H),
    }
    adapter = ours()
    found = adapter.to_hf(native)
    assert list(found) == list(native) == adapter.get_hf_state_dict_keys(native)
    assert all(found[name] is tensor for name, tensor in native.items())
    back = adapter.from_hf(found)
    assert all(back[name] is tensor for name, tensor in native.items())
    for name, tensor in native.items():
        assert adapter.convert_single_tensor_to_hf(name, tensor) == [(name, tensor)]


def test_the_module_of_the_router_has_its_hf_name_in_an_adapters_config():
    adapter = ours()
    for prefix in ("model.language_model.", "model.", ""):
        named = adapter.map_peft_target_module_to_hf(f"{prefix}layers.12.moe.gate.proj", v4_compatible=True)
        assert named == f"{prefix}layers.12.router.proj"
    for name in ("q_proj", "model.layers.1.moe.gate", "model.moe.gate.proj", "model.layers.1.self_attn.q_proj"):
        assert adapter.map_peft_target_module_to_hf(name) == name
