"""The state that a stream sends: models in either layout, wrappers, adapters beside the weights, and later changes."""

import pytest
import torch

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.errors import DuplicateTensorError, InputError
from gemma4_moe.refit import WeightStream
from support.models import module_of, random_hf_state_dict
from support.streams import ADAPTER, E, H, I, assert_same_stream, copied, expected_stream, nemo_state, per_expert

BF16 = torch.bfloat16
LAYER = "model.language_model.layers.1."


def in_order(hf):
    return dict(sorted(hf.items()))


def test_a_module_needs_no_adapter():
    nemo = nemo_state()
    assert_same_stream(WeightStream(module_of(nemo)), expected_stream(nemo))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_a_transformers_model_is_sent_as_it_is(kind, experts):
    model = build_model(kind)
    state = in_order({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"})
    stream = WeightStream(model, experts=experts)
    expected = list(state.items()) if experts == "fused" else per_expert(state)
    assert any(name.endswith("per_expert_scale") and not bool((tensor == 1).any()) for name, tensor in expected)
    assert_same_stream(stream, expected)
    assert_same_stream(copied(stream.buckets()), expected)


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_an_hf_state_is_cast(experts):
    hf = in_order(random_hf_state_dict(layers=2, E=E, H=H, I=I, dtype=torch.float32))
    cast = {name: tensor.to(BF16) for name, tensor in hf.items()}
    expected = list(cast.items()) if experts == "fused" else per_expert(cast)
    assert_same_stream(WeightStream(hf, experts=experts, dtype=BF16), expected)
    assert_same_stream(copied(WeightStream(hf, experts=experts, dtype=BF16).buckets()), expected)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('layers.2.', 'layers.2._fsdp_wrapped_module.')}",
    ],
)
def test_names_lose_their_wrappers(wrapped):
    nemo = nemo_state()
    state = {wrapped(name): tensor for name, tensor in nemo.items()}
    assert_same_stream(WeightStream(state, ADAPTER), expected_stream(nemo))


def test_two_names_that_become_one_are_an_error():
    nemo = nemo_state()
    name = f"{LAYER}layer_scalar"
    with pytest.raises(DuplicateTensorError, match=f"(?s)become one.*_orig_mod.{name}.*also {name}"):
        WeightStream(nemo | {f"_orig_mod.{name}": nemo[name]}, ADAPTER)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}self_attn.q_proj.lora_A.weight",
        f"{LAYER}moe.gate.proj.lora_B.default.weight",
        f"{LAYER}moe.experts.lora_down_A",
        f"{LAYER}self_attn.q_proj.base_layer.weight",
    ],
)
def test_an_adapter_that_is_not_merged_is_refused(name):
    state = nemo_state() | {name: torch.ones(3, 5)}
    with pytest.raises(InputError, match=f"(?s)not merged.*{name}.*lora=.merged.*lora=.separate.*exclude_key_regex"):
        WeightStream(state, ADAPTER)
    if "lora_" in name:
        assert_same_stream(WeightStream(state, ADAPTER, exclude_key_regex=r".*\blora_"), expected_stream(nemo_state()))


def test_an_excluded_tensor_is_not_checked():
    nemo = nemo_state()
    odd = {
        f"{LAYER}moe.experts.gate_and_up_projs": torch.ones(2, 3),
        f"{LAYER}moe.experts.unknown": torch.ones(2),
        f"{LAYER}self_attn.packed": torch.zeros(3, dtype=torch.complex64),
    }
    expected = [pair for pair in expected_stream(nemo) if pair[0] != f"{LAYER}experts.gate_up_proj"]
    regex = r".*(layers\.1\.experts\.gate_up_proj|unknown|packed)"
    assert_same_stream(WeightStream(nemo | odd, ADAPTER, exclude_key_regex=regex), expected)


def test_extra_state_is_left_out_even_if_it_is_a_tensor():
    nemo = nemo_state()
    state = nemo | {f"{LAYER}self_attn._extra_state": torch.ones(2, dtype=torch.uint8)}
    assert_same_stream(WeightStream(state, ADAPTER), expected_stream(nemo))


def a_tensor_that_came(state):
    state["model.new"] = torch.ones(2)


def a_tensor_that_went(state):
    del state["model.tied"]


def untied(state):
    state["model.tied"] = state["model.tied"].clone()


def tied(state):
    state[f"{LAYER}layer_scalar"] = state["model.language_model.layers.0.layer_scalar"]


def tied_elsewhere(state):
    state["model.tied"] = state[f"{LAYER}layer_scalar"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (a_tensor_that_came, r"model\.new.*no tensor of this name.*\[2\]"),
        (a_tensor_that_went, r"model\.tied.*the same tensor as.*embed_tokens.*no tensor of this name"),
        (untied, r"model\.tied.*the same tensor as.*embed_tokens.*\["),
        (tied, r"layers\.1\.layer_scalar.*the same tensor as .*layers\.0"),
        (tied_elsewhere, r"model\.tied.*the same tensor as .*embed_tokens.*the same tensor as .*layer_scalar"),
    ],
)
def test_what_changed_after_planning_is_an_error_before_the_first_tensor(change, words):
    state = nemo_state()
    state["model.tied"] = state["model.language_model.embed_tokens.weight"]
    stream = WeightStream(state, ADAPTER)
    assert_same_stream(stream, expected_stream(nemo_state()))
    change(state)
    with pytest.raises(InputError, match=f"(?s)changed since.*{words}.*make a new WeightStream"):
        next(iter(stream))


def test_names_are_given_by_a_function():
    nemo = nemo_state()
    prefix = "model.language_model."
    stream = WeightStream(
        nemo, ADAPTER, names=lambda name: None if "router" in name else f"engine.{name.removeprefix(prefix)}"
    )
    expected = [(f"engine.{name.removeprefix(prefix)}", t) for name, t in expected_stream(nemo) if "router" not in name]
    assert_same_stream(stream, expected)
    with pytest.raises(DuplicateTensorError, match=r"(?s)under one name.*one.*names"):
        WeightStream(nemo, ADAPTER, names=lambda _: "one")


def test_single_experts_may_be_left_out():
    nemo = nemo_state()
    kept = ("experts.1.", "experts.2.up", "experts.4.", "experts.5.down")
    expected = [
        pair
        for pair in expected_stream(nemo, experts="per-expert")
        if ".experts." not in pair[0] or any(k in pair[0] for k in kept)
    ]
    wanted = {name for name, _ in expected}
    stream = WeightStream(nemo, ADAPTER, experts="per-expert", names=lambda name: name if name in wanted else None)
    assert_same_stream(stream, expected)
    assert_same_stream(copied(stream.buckets()), expected)


def test_dtypes_are_given_by_a_function():
    nemo = nemo_state()
    found = dict(WeightStream(nemo, ADAPTER, dtype=lambda name: torch.float32 if "router" in name else None))
    assert {tensor.dtype for name, tensor in found.items() if "router" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in found.items() if "router" not in name} == {BF16}
    named = WeightStream(nemo, ADAPTER, dtype=lambda name: "float16" if name.endswith("gate_up_proj") else "bfloat16")
    assert {planned.dtype for planned in named.plan() if planned.name.endswith("gate_up_proj")} == {"float16"}
