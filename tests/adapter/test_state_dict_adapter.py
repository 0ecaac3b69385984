"""The adapter in one process: what each call returns, and what it leaves alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig, StateDictAdapter
from gemma4_moe.errors import (
    IncompleteExpertsError,
    TensorShapeError,
    UsageError,
)
from support.formulas import (
    assert_same_tensors,
    exact_fold,
    folded,
    hf_from_nemo,
    legacy_name,
    nemo_from_hf,
)
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

P = "model.language_model."
LAYER = f"{P}layers.0."
GATE_UP, DOWN, SCALE = f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj", f"{LAYER}router.per_expert_scale"
NATIVE_GATE_UP, NATIVE_DOWN = f"{LAYER}moe.experts.gate_and_up_projs", f"{LAYER}moe.experts.down_projs"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = {"hidden_size": 10, "moe_intermediate_size": 7}


def adapter(dtype: torch.dtype = torch.bfloat16) -> Gemma4MoEStateDictAdapter:
    return Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def hf() -> dict[str, torch.Tensor]:
    return random_hf_state_dict()


@pytest.fixture
def nemo(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return nemo_from_hf(hf)


def test_it_is_the_interface_that_a_framework_asks_for() -> None:
    found = adapter()
    assert isinstance(found, StateDictAdapter)
    assert found.supports_low_memory_dcp_load
    assert found.checkpoint_key_aliases == {}
    assert found.iter_checkpoint_load_parts({}, device_mesh=None) is None
    assert found.map_peft_target_module_to_hf("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert Gemma4MoEStateDictAdapter(None, None, None).dtype is torch.float32


def test_a_framework_may_set_attributes_of_its_own() -> None:
    found = adapter()
    found._paramwrapper_layout_hint = "legacy"  # type: ignore[attr-defined]
    assert found._paramwrapper_layout_hint == "legacy"  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_from_hf_is_the_formula_for_every_pair_of_dtypes(source: torch.dtype, target: torch.dtype) -> None:
    hf = random_hf_state_dict(dtype=source, E=5, H=9, I=4, layers=3)
    expected = nemo_from_hf(hf, target)
    found = adapter(target).from_hf(hf)
    assert_same_tensors(found, expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_the_scale_has_a_dtype_of_its_own_and_is_not_rounded_first(
    hf: dict[str, torch.Tensor], scale_dtype: torch.dtype
) -> None:
    hf[SCALE] = (torch.rand(6) + 0.5).to(scale_dtype)
    found = adapter().from_hf(hf)[NATIVE_DOWN]
    assert_same_tensors({"down": found}, {"down": folded(hf[DOWN], hf[SCALE], torch.bfloat16)})


def test_bf16_into_an_fp32_model_is_the_exact_product_and_not_a_rounded_one(hf: dict[str, torch.Tensor]) -> None:
    exact = exact_fold(hf[DOWN], hf[SCALE])
    assert torch.equal(adapter(torch.float32).from_hf(hf)[NATIVE_DOWN].double(), exact)
    rounded = folded(hf[DOWN], hf[SCALE], torch.bfloat16)
    assert (rounded.double() != exact).float().mean() > 0.9, "these values would not show the wrong order of rounding"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_hf_is_the_formula_with_a_scale_of_ones(dtype: torch.dtype) -> None:
    nemo = nemo_from_hf(random_hf_state_dict(dtype=dtype, E=5, H=9, I=4))
    found = adapter(torch.float16).to_hf(nemo)
    assert_same_tensors(found, hf_from_nemo(nemo))
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert_same_tensors(adapter(dtype).from_hf(found), nemo)


def test_the_scale_comes_right_after_its_down_proj_and_the_order_is_the_inputs(nemo: dict[str, torch.Tensor]) -> None:
    names = list(adapter().to_hf(nemo))
    assert names == [
        hf
        for name in nemo
        for hf in hf_from_nemo({name: torch.zeros(1, 1, 1)})  # the formula keeps the order of one tensor
    ]
    assert names.index(SCALE) == names.index(DOWN) + 1


@pytest.mark.parametrize("prefix", [P, "model.", "language_model.", "", "base_model.model.model.", "model.decoder."])
def test_every_name_keeps_its_own_prefix(prefix: str) -> None:
    hf = random_hf_state_dict(prefix=prefix)
    nemo = adapter().from_hf(hf)
    assert_same_tensors(nemo, nemo_from_hf(hf))
    assert all(name.startswith(prefix) for name in nemo)
    assert_same_tensors(adapter().to_hf(nemo), hf_from_nemo(nemo))


def test_two_towers_with_the_same_layer_number_stay_apart() -> None:
    left = random_hf_state_dict(prefix="left.", seed=1)
    right = random_hf_state_dict(prefix="right.", seed=2, E=4, H=6, I=5)
    interleaved = dict(sorted((left | right).items(), key=lambda item: item[0][::-1]))
    nemo = adapter().from_hf(interleaved)
    assert_same_tensors(nemo, nemo_from_hf(left) | nemo_from_hf(right))
    assert_same_tensors(adapter().to_hf(nemo), hf_from_nemo(nemo_from_hf(left) | nemo_from_hf(right)))


def test_the_legacy_spelling_gives_the_same_model(hf: dict[str, torch.Tensor]) -> None:
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert legacy.keys() != hf.keys()
    assert_same_tensors(adapter().from_hf(legacy), nemo_from_hf(hf))
    half = {legacy_name(name) if name == DOWN else name: tensor for name, tensor in hf.items()}
    assert_same_tensors(adapter().from_hf(half), nemo_from_hf(hf))


def test_inputs_are_never_modified_and_never_aliased_by_expert_tensors(hf: dict[str, torch.Tensor]) -> None:
    before = copies(hf)
    nemo = adapter().from_hf(hf)
    assert_same_tensors(hf, before)
    experts = {name for name in nemo if ".moe.experts." in name}
    for name in experts:
        nemo[name].fill_(3)
    assert_same_tensors(hf, before)
    before = copies(nemo)
    back = adapter().to_hf(nemo)
    assert_same_tensors(nemo, before)
    for name, tensor in back.items():
        if "experts." in name:
            tensor.fill_(4)
    assert_same_tensors(nemo, before)


def test_all_but_expert_tensors_pass_as_the_same_objects(hf: dict[str, torch.Tensor]) -> None:
    hf[f"{LAYER}router.scale"] = torch.nn.Parameter(hf[f"{LAYER}router.scale"].float())
    nemo = adapter(torch.float32).from_hf(hf)
    assert nemo[f"{LAYER}moe.gate.scale"] is hf[f"{LAYER}router.scale"]
    assert nemo[f"{LAYER}moe.gate.proj.weight"] is hf[f"{LAYER}router.proj.weight"]
    same = [name for name in hf if "experts." not in name and "router." not in name]
    assert len(same) == 7
    assert all(nemo[name] is hf[name] for name in same)
    back = adapter().to_hf(nemo)
    assert all(back[name] is hf[name] for name in [*same, f"{LAYER}router.scale", f"{LAYER}router.proj.weight"])


def test_expert_tensors_leave_the_graph_of_their_parameters(nemo: dict[str, torch.Tensor]) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in nemo.items()}
    back = adapter().to_hf(parameters)
    assert_same_tensors(back, hf_from_nemo(nemo))
    assert not any(back[name].requires_grad for name in (GATE_UP, DOWN, SCALE))
    again = adapter().from_hf({name: torch.nn.Parameter(tensor) for name, tensor in back.items()})
    assert not again[NATIVE_DOWN].requires_grad


def test_strided_inputs_give_the_same_bits(hf: dict[str, torch.Tensor]) -> None:
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
def test_an_unusual_scale_is_folded_as_it_is(value: float) -> None:
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
def test_any_config_that_fits_gives_the_same_result(hf: dict[str, torch.Tensor], config: Any, moe_config: Any) -> None:
    sized = Gemma4MoEStateDictAdapter(config, moe_config, SimpleNamespace(attn="sdpa"), dtype=torch.bfloat16)
    assert_same_tensors(sized.from_hf(hf), nemo_from_hf(hf))


def test_arguments_that_a_framework_passes_to_every_adapter_change_nothing(
    hf: dict[str, torch.Tensor], nemo: dict[str, torch.Tensor]
) -> None:
    handed = {"v4_compatible": True, "legacy_paramwrapper_layout": False, "exclude_key_regex": r".*_extra_state.*"}
    assert_same_tensors(adapter().from_hf(hf, None, **handed), nemo_from_hf(hf))
    assert_same_tensors(adapter().to_hf(nemo, quantization=False, **handed), hf_from_nemo(nemo))
    single = adapter().convert_single_tensor_to_hf(NATIVE_DOWN, nemo[NATIVE_DOWN], quantization=False, **handed)
    assert [name for name, _ in single] == [DOWN, SCALE]


@pytest.fixture
def mesh_of_one() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep_shard", "ep"))
    dist.destroy_process_group()


def test_a_mesh_of_one_rank_is_no_mesh(
    hf: dict[str, torch.Tensor], nemo: dict[str, torch.Tensor], mesh_of_one: DeviceMesh
) -> None:
    assert_same_tensors(adapter().from_hf(hf, device_mesh=mesh_of_one), nemo_from_hf(hf))
    assert_same_tensors(adapter().to_hf(nemo, device_mesh=mesh_of_one), hf_from_nemo(nemo))


def test_converting_tensor_by_tensor_is_to_hf(nemo: dict[str, torch.Tensor]) -> None:
    whole = adapter().to_hf(nemo)
    pairs = [pair for name in nemo for pair in adapter().convert_single_tensor_to_hf(name, nemo[name])]
    assert [name for name, _ in pairs] == list(whole)
    assert_same_tensors(dict(pairs), whole)


@pytest.mark.parametrize("rest", ["gate_and_up_projs", "down_projs"])
def test_one_tensor_needs_no_other_and_is_checked_as_far_as_it_shows(rest: str) -> None:
    name = f"model.layers.3.moe.experts.{rest}"
    for bad in (torch.ones(6, 10), torch.ones(6, 0, 4), torch.ones(6)):
        with pytest.raises(TensorShapeError):
            adapter().convert_single_tensor_to_hf(name, bad)


def test_meta_tensors_give_the_plan_of_the_real_ones(
    hf: dict[str, torch.Tensor], nemo: dict[str, torch.Tensor]
) -> None:
    for call, state, expected in (
        (adapter().to_hf, nemo, hf_from_nemo(nemo)),
        (adapter(torch.float32).from_hf, hf, nemo_from_hf(hf, torch.float32)),
    ):
        found = call({name: tensor.to("meta") for name, tensor in state.items()})
        assert {tensor.device.type for tensor in found.values()} == {"meta"}
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
        assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}


def test_the_list_of_keys_is_that_of_to_hf_in_its_order(nemo: dict[str, torch.Tensor]) -> None:
    expected = list(adapter().to_hf(nemo))
    meta = {name: tensor.to("meta") for name, tensor in nemo.items()}
    for state in (nemo, meta, list(meta.items()), iter(nemo.items()), dict.fromkeys(nemo)):
        assert adapter().get_hf_state_dict_keys(state) == expected
    reverse = dict(reversed(nemo.items()))
    assert adapter().get_hf_state_dict_keys(reverse) == list(adapter().to_hf(reverse)) != expected


def test_two_adapters_and_two_calls_do_not_influence_each_other(hf: dict[str, torch.Tensor]) -> None:
    wide, narrow = adapter(torch.float32), adapter(torch.bfloat16)
    with pytest.raises(IncompleteExpertsError):
        narrow.from_hf({name: tensor for name, tensor in hf.items() if name != SCALE})
    other = random_hf_state_dict(E=3, H=4, I=5, seed=9)
    for one, dtype in itertools.product((wide, narrow), range(2)):
        del dtype
        assert_same_tensors(one.from_hf(hf), nemo_from_hf(hf, one.dtype))
        assert_same_tensors(one.from_hf(other), nemo_from_hf(other, one.dtype))


def test_an_adapter_holds_nothing_but_its_arguments(hf: dict[str, torch.Tensor], nemo: dict[str, torch.Tensor]) -> None:
    one = adapter()
    before = dict(vars(one))
    one.from_hf(hf)
    one.to_hf(nemo)
    one.to_hf(copies(nemo), for_checkpoint_load=True)
    assert vars(one) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_in_its_own_dtype_and_returned(hf: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    out = {name: torch.nn.Parameter(torch.full_like(t, -3, dtype=dtype)) for name, t in nemo_from_hf(hf).items()}
    found = adapter(torch.float16).from_hf(hf, out=out)
    assert all(found[name] is tensor for name, tensor in out.items())
    expected = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf, dtype).items()}
    assert_same_tensors(found, expected)


def test_out_may_be_strided(hf: dict[str, torch.Tensor]) -> None:
    expected = nemo_from_hf(hf)
    out = {name: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 1] for name, t in expected.items()}
    assert not out[NATIVE_DOWN].is_contiguous()
    assert_same_tensors(adapter().from_hf(hf, out=out), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, "bf16"])
def test_a_dtype_that_no_expert_has_is_refused_at_once(hf: dict[str, torch.Tensor], dtype: Any) -> None:
    with pytest.raises(UsageError, match="no dtype for expert tensors"):
        Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)
    if isinstance(dtype, torch.dtype):
        out = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf).items()}
        with pytest.raises(TensorShapeError, match="experts"):
            Gemma4MoEStateDictAdapter(None, None, None).from_hf(hf, out=out)
