"""The options of a stream: what is left out, refused, renamed and cast, and states without an adapter."""

import re

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import DuplicateTensorError, InputError, TensorShapeError, UsageError
from gemma4_moe.refit import WeightStream
from support.models import module_of
from support.streams import ADAPTER, E, H, I, assert_same_stream, copied, expected_stream, nemo_state

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYER = "model.language_model.layers.1."
DOWN = LAYER + "moe.experts.down_projs"


class Config:
    num_experts, hidden_size, moe_intermediate_size = E, H, I


def changed(stream, words):
    with pytest.raises(InputError, match=f"(?s)changed since the stream was planned.*{words}.*new WeightStream"):
        list(stream)
    with pytest.raises(InputError, match=f"(?s)changed since the stream was planned.*{words}"):
        list(stream.buckets())


def test_a_module_needs_no_adapter():
    model = module_of(nemo_state())
    assert_same_stream(WeightStream(model), expected_stream(nemo_state()))
    for field, value in (
        ("config", type("Other", (Config,), {"hidden_size": H + 1})()),
        ("state_dict_adapter", Gemma4MoEStateDictAdapter(None, MoEConfig(E, H + 1, I), None)),
    ):
        other = module_of(nemo_state())
        setattr(other, field, value)
        with pytest.raises(TensorShapeError, match=f"H = {H + 1} from the config"):
            WeightStream(other)
        assert WeightStream(other, ADAPTER).plan()  # one that is given goes before the module's own
    model.config, model.state_dict_adapter = Config(), object()  # another library's adapter
    assert_same_stream(WeightStream(model), expected_stream(nemo_state()))


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.language_model.layers.0.moe.gate.proj.lora_A.weight",
        "model.language_model.layers.0.moe.experts.lora_gate_and_up_A",
    ],
)
def test_a_lora_adapter_is_refused_until_it_is_excluded(name):
    state = nemo_state() | {name: torch.ones(4, 3)}
    with pytest.raises(InputError, match=rf"(?s)not merged.*{re.escape(name)}.*merge.*exclude_key_regex"):
        WeightStream(state)
    stream = WeightStream(state, exclude_key_regex=r".*(lora_|base_layer)")
    assert_same_stream(stream, expected_stream(nemo_state()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (LAYER + "moe.experts.amax", torch.ones(3)),  # a name that no layout has
        (DOWN, torch.ones(E, H + 3, I, dtype=BF16)),  # a shape
        (DOWN, torch.ones(E, I, H, dtype=torch.float64)),  # a dtype of no expert
        (LAYER + "odd", torch.ones(3, dtype=torch.complex128)),  # a dtype of no file
        (DOWN, "no tensor"),
    ],
)
def test_excluded_tensors_are_not_checked(name, value):
    state = nemo_state() | {name: value}
    left = [
        (n, t)
        for n, t in expected_stream(nemo_state())
        if n not in (LAYER + "experts.down_proj", LAYER + "router.per_expert_scale")
    ]
    expected = left if name == DOWN else expected_stream(nemo_state())
    if not isinstance(value, str):
        with pytest.raises(InputError):
            WeightStream(state, ADAPTER)
    for stream in (WeightStream(state, ADAPTER, exclude_key_regex=re.escape(name)),):
        assert_same_stream(stream, expected)
        assert_same_stream(copied(stream.buckets()), expected)


def test_extra_state_is_left_out_even_as_a_tensor():
    state = nemo_state() | {"a._extra_state": torch.ones(3), "_extra_state": torch.ones(2, dtype=torch.complex128)}
    stream = WeightStream(state)
    assert_same_stream(stream, expected_stream(nemo_state()))
    state["b._extra_state"] = torch.ones(4)
    assert_same_stream(stream, expected_stream(nemo_state()))


def test_a_tensor_that_came_is_an_error():
    state = nemo_state()
    stream = WeightStream(state, exclude_key_regex=r"other\.")
    state["other.weight"] = torch.ones(2)  # excluded
    state["steps"] = 3  # no tensor
    assert_same_stream(stream, expected_stream(nemo_state()))
    state["new.weight"] = torch.ones(2)
    changed(stream, r"new\.weight")
    parts = [nemo_state(), {"z.weight": torch.ones(2)}]
    stream = WeightStream(parts, layers=[0, 1])  # which never reaches the last mapping
    list(stream)
    parts[1]["z.lora_A.weight"] = torch.ones(2)
    changed(stream, r"z\.lora_A\.weight")


def test_a_tensor_that_was_untied_or_lost_its_second_name_is_an_error():
    embedding = "model.language_model.embed_tokens.weight"
    state = nemo_state()
    state["lm_head.weight"] = state[embedding]
    stream = WeightStream(state)
    assert_same_stream(stream, expected_stream(nemo_state()))
    state["lm_head.weight"] = state[embedding].clone()
    changed(stream, r"lm_head\.weight.*same tensor as model\.language_model\.embed_tokens")
    del state["lm_head.weight"]
    changed(stream, r"lm_head\.weight.*same tensor as model\.language_model\.embed_tokens.*no tensor of this name")


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_names_are_the_callers(experts):
    def names(name):
        if re.search(r"layer_scalar|experts\.2\.up_proj|experts\.4\.down_proj", name):
            return None
        return "actor." + name

    stream = WeightStream(nemo_state(), experts=experts, names=names, bucket_bytes=2**14)
    expected = [(names(n), t) for n, t in expected_stream(nemo_state(), experts=experts) if names(n)]
    assert_same_stream(stream, expected)
    assert_same_stream(copied(stream.buckets()), expected)
    assert [planned.name for planned in stream.plan()] == [name for name, _ in expected]
    with pytest.raises(DuplicateTensorError, match=r"(?s)two tensors under one name.*layers\.1.*same, as .*layers\.0"):
        WeightStream(nemo_state(), names=lambda name: "same" if name.endswith("layer_scalar") else name)


def test_a_tied_name_is_renamed_in_the_preflight():
    state = nemo_state()
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    stream = WeightStream(state, names=lambda name: "actor." + name)
    stream.preflight([*("actor." + name for name, _ in expected_stream(nemo_state())), "actor.lm_head.weight"])


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_a_dtype_by_name(experts):
    def dtype(name):
        if re.search(r"experts\.3\.(gate|down)_proj|router", name):
            return FP32
        return "float16" if "layers.1." in name else None

    def cast(name, tensor):
        wanted = dtype(name)
        return tensor if wanted is None else tensor.to(FP16 if wanted == "float16" else wanted)

    state = nemo_state() | {"count": torch.tensor(3)}
    expected = [(n, cast(n, t)) for n, t in expected_stream(nemo_state(), experts=experts)]
    stream = WeightStream(state, experts=experts, dtype=dtype, exclude_key_regex="count")
    assert_same_stream(stream, expected)
    assert_same_stream(copied(stream.buckets()), expected)
    assert dict(WeightStream(state, dtype=lambda _: BF16))["count"].dtype == torch.int64
    with pytest.raises(UsageError, match="no dtype to convert to"):
        WeightStream(state, dtype=lambda _: "int8")


def test_small_tensors_can_be_copies_that_hold_no_buffer():
    kept = []
    for bucket in WeightStream(nemo_state(), bucket_bytes=4096, buffers=2).buckets():
        kept += [(name, t) for name, t in bucket.tensors(copy_up_to=2 * H) if t.nbytes <= 2 * H]
        whole = {t.untyped_storage().data_ptr() for _, t in bucket.tensors(copy_up_to=0)}
        assert whole == {bucket.buffer.untyped_storage().data_ptr()}
    expected = [(name, t) for name, t in expected_stream(nemo_state()) if t.nbytes <= 2 * H]
    assert_same_stream(kept, expected)
