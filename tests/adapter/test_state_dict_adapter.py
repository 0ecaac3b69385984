"""The adapter in one process: what each call returns, and what it leaves alone."""

from types import SimpleNamespace

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig, StateDictAdapter
from gemma4_moe.errors import IncompleteExpertsError, TensorShapeError, UsageError
from support.formulas import assert_same_tensors, folded, hf_from_nemo, nemo_from_hf
from support.models import DOWN, GATE_UP, LAYER, NATIVE_DOWN, SCALE, random_hf_state_dict

State = dict[str, torch.Tensor]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = {"hidden_size": 10, "moe_intermediate_size": 7}


def adapter(dtype=torch.bfloat16):
    return Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)


def copies(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_it_is_the_interface_that_a_framework_asks_for():
    found = adapter()
    assert isinstance(found, StateDictAdapter)
    assert found.supports_low_memory_dcp_load
    assert found.checkpoint_key_aliases == {}
    assert found.iter_checkpoint_load_parts({}, device_mesh=None) is None
    assert found.map_peft_target_module_to_hf("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert Gemma4MoEStateDictAdapter(None, None, None).dtype is torch.float32
    found._paramwrapper_layout_hint = "legacy"  # frameworks set attributes of their own


def test_two_towers_with_the_same_layer_number_stay_apart():
    left = random_hf_state_dict(prefix="left.", seed=1)
    right = random_hf_state_dict(prefix="right.", seed=2, E=4, H=6, I=5)
    interleaved = dict(sorted((left | right).items(), key=lambda item: item[0][::-1]))
    nemo = adapter().from_hf(interleaved)
    assert_same_tensors(nemo, nemo_from_hf(left) | nemo_from_hf(right))
    assert_same_tensors(adapter().to_hf(nemo), hf_from_nemo(nemo_from_hf(left) | nemo_from_hf(right)))


def test_inputs_are_never_modified_and_never_aliased_by_expert_tensors(hf):
    for state, convert in ((hf, adapter().from_hf), (nemo_from_hf(hf), adapter().to_hf)):
        before = copies(state)
        found = convert(state)
        assert_same_tensors(state, before)
        experts = [tensor for name, tensor in found.items() if "experts." in name]
        assert len(experts) == 4
        for tensor in experts:
            tensor.fill_(3)
        assert_same_tensors(state, before)


def test_all_but_expert_tensors_pass_as_the_same_objects(hf):
    hf[f"{LAYER}router.scale"] = torch.nn.Parameter(hf[f"{LAYER}router.scale"].float())
    nemo = adapter(torch.float32).from_hf(hf)
    assert nemo[f"{LAYER}moe.gate.scale"] is hf[f"{LAYER}router.scale"]
    assert nemo[f"{LAYER}moe.gate.proj.weight"] is hf[f"{LAYER}router.proj.weight"]
    same = [name for name in hf if "experts." not in name and "router." not in name]
    assert len(same) == 7
    assert all(nemo[name] is hf[name] for name in same)
    back = adapter().to_hf(nemo)
    assert all(back[name] is hf[name] for name in [*same, f"{LAYER}router.scale", f"{LAYER}router.proj.weight"])


def test_expert_tensors_leave_the_graph_of_their_parameters(nemo):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in nemo.items()}
    back = adapter().to_hf(parameters)
    assert_same_tensors(back, hf_from_nemo(nemo))
    assert not any(back[name].requires_grad for name in (GATE_UP, DOWN, SCALE))
    again = adapter().from_hf({name: torch.nn.Parameter(tensor) for name, tensor in back.items()})
    assert not again[NATIVE_DOWN].requires_grad


def test_strided_inputs_give_the_same_bits(hf):
    strided = dict(hf)
    for name in (GATE_UP, DOWN):
        strided[name] = hf[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not strided[name].is_contiguous()
    strided[SCALE] = torch.stack([hf[SCALE], -hf[SCALE]], dim=1)[:, 0]
    assert_same_tensors(adapter().from_hf(strided), nemo_from_hf(hf))
    nemo = {
        name: tensor.mT.contiguous().mT if tensor.ndim == 3 else tensor for name, tensor in nemo_from_hf(hf).items()
    }
    found = adapter().to_hf(nemo)
    assert_same_tensors(found, hf_from_nemo(nemo))
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -0.75, 1.0, 1e-40, 3e38])
def test_an_unusual_scale_is_folded_as_it_is(value):
    hf = random_hf_state_dict(dtype=torch.float32)
    hf[SCALE][3] = value
    hf[DOWN][3, 0, :4] = torch.tensor([0.0, -0.0, float("inf"), 1e-38])
    found = adapter(torch.float32).from_hf(hf)[NATIVE_DOWN]
    expected = folded(hf[DOWN], hf[SCALE], torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_tensors({"down": found.nan_to_num()}, {"down": expected.nan_to_num()})
    assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize(
    ("config", "moe_config"),
    [
        (None, None),
        (None, SimpleNamespace(n_routed_experts=6)),
        (SimpleNamespace(**SIZES), MoEConfig(6)),
        (SimpleNamespace(text_config=SimpleNamespace(**SIZES, num_experts=6)), MoEConfig(6, 10, 7)),
        (object(), object()),
    ],
)
def test_any_config_that_fits_gives_the_same_result(hf, config, moe_config):
    sized = Gemma4MoEStateDictAdapter(config, moe_config, SimpleNamespace(attn="sdpa"), dtype=torch.bfloat16)
    assert_same_tensors(sized.from_hf(hf), nemo_from_hf(hf))


def test_arguments_that_a_framework_passes_to_every_adapter_change_nothing(hf, nemo):
    handed = {"v4_compatible": True, "legacy_paramwrapper_layout": False, "exclude_key_regex": r".*_extra_state.*"}
    assert_same_tensors(adapter().from_hf(hf, None, **handed), nemo_from_hf(hf))
    assert_same_tensors(adapter().to_hf(nemo, quantization=False, **handed), hf_from_nemo(nemo))
    single = adapter().convert_single_tensor_to_hf(NATIVE_DOWN, nemo[NATIVE_DOWN], quantization=False, **handed)
    assert [name for name, _ in single] == [DOWN, SCALE]


@pytest.mark.parametrize("rest", ["gate_and_up_projs", "down_projs"])
def test_one_tensor_needs_no_other_and_is_checked_as_far_as_it_shows(rest):
    name = f"model.layers.3.moe.experts.{rest}"
    for bad in (torch.ones(6, 10), torch.ones(6, 0, 4), torch.ones(6)):
        with pytest.raises(TensorShapeError):
            adapter().convert_single_tensor_to_hf(name, bad)


def test_meta_tensors_give_the_plan_of_the_real_ones(hf, nemo):
    for call, state, expected in (
        (adapter().to_hf, nemo, hf_from_nemo(nemo)),
        (adapter(torch.float32).from_hf, hf, nemo_from_hf(hf, torch.float32)),
    ):
        found = call({name: tensor.to("meta") for name, tensor in state.items()})
        assert {tensor.device.type for tensor in found.values()} == {"meta"}
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
        assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}


def test_the_list_of_keys_is_that_of_to_hf_in_its_order(nemo):
    expected = list(adapter().to_hf(nemo))
    meta = {name: tensor.to("meta") for name, tensor in nemo.items()}
    for state in (nemo, meta, list(meta.items()), iter(nemo.items()), dict.fromkeys(nemo)):
        assert adapter().get_hf_state_dict_keys(state) == expected
    reverse = dict(reversed(nemo.items()))
    assert adapter().get_hf_state_dict_keys(reverse) == list(adapter().to_hf(reverse)) != expected


def test_two_adapters_and_two_calls_do_not_influence_each_other_and_keep_nothing(hf, nemo):
    wide, narrow = adapter(torch.float32), adapter(torch.bfloat16)
    before = dict(vars(wide)), dict(vars(narrow))
    with pytest.raises(IncompleteExpertsError):
        narrow.from_hf({name: tensor for name, tensor in hf.items() if name != SCALE})
    other = random_hf_state_dict(E=3, H=4, I=5, seed=9)
    for one in (wide, narrow, wide, narrow):
        for state in (hf, other, hf):
            assert_same_tensors(one.from_hf(state), nemo_from_hf(state, one.dtype))
        one.to_hf(nemo)
        one.to_hf(copies(nemo), for_checkpoint_load=True)
    assert (vars(wide), vars(narrow)) == before


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_in_its_own_dtype_and_strides_and_returned(hf, dtype, strided):
    expected = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf, dtype).items()}
    wide = {name: torch.full((*tensor.shape, 2), -3, dtype=dtype)[..., 1] for name, tensor in expected.items()}
    out = {name: torch.nn.Parameter(tensor if strided else tensor.contiguous()) for name, tensor in wide.items()}
    assert out[NATIVE_DOWN].is_contiguous() is not strided
    found = adapter(torch.float16).from_hf(hf, out=out)
    assert all(found[name] is tensor for name, tensor in out.items())
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, "bf16"])
def test_a_dtype_that_no_expert_has_is_refused_at_once(hf, dtype):
    with pytest.raises(UsageError, match="no dtype for expert tensors"):
        Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)
    if isinstance(dtype, torch.dtype):
        out = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf).items()}
        with pytest.raises(TensorShapeError, match="experts"):
            Gemma4MoEStateDictAdapter(None, None, None).from_hf(hf, out=out)
