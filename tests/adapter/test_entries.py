"""How the adapter takes in a state dict: in any form, not before it has to, and without entries that are excluded."""

import gc
import io
import re
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import DOWN, LAYER, NATIVE_DOWN, SCALE, Lazy, random_hf_state_dict

State = dict[str, torch.Tensor]
ADAPTER = Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.bfloat16)
NEMO = nemo_from_hf(random_hf_state_dict())


def alive_at_each_step(convert, state):
    """The names of the tensors of an iterator that are alive whenever the next is asked for, and the result."""
    alive = []
    made = {}

    def entries():
        for name in state:
            alive.append({name for name, reference in made.items() if reference() is not None})
            yield name, fresh(name)

    def fresh(name):
        tensor = state[name].clone()
        made[name] = weakref.ref(tensor)
        return tensor

    gc.disable()
    try:
        return alive, convert(entries())
    finally:
        gc.enable()


def test_tensors_of_an_iterator_are_released_before_the_next_is_asked_for(hf, nemo):
    names = [name for name in hf if "expert" in name]
    assert len(names) == 6
    names.sort(key=lambda name: (name.split("layers.")[1][0], "scale" in name, "gate" in name))
    alive, found = alive_at_each_step(ADAPTER.from_hf, {name: hf[name] for name in names})
    down = [f"model.language_model.layers.{layer}.experts.down_proj" for layer in range(2)]
    assert alive == [set(), {down[0]}, {down[0]}, set(), {down[1]}, {down[1]}]
    experts = {name: tensor for name, tensor in nemo.items() if "moe.experts" in name}
    assert_same_tensors(found, experts)
    alive, found = alive_at_each_step(ADAPTER.to_hf, experts)
    assert alive == [set()] * 4
    assert_same_tensors(found, hf_from_nemo(experts))


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_lazy_slices_of_a_file_give_what_tensors_give(hf, tmp_path, direction):
    hf["model.step"] = torch.tensor(7, dtype=torch.int64)
    nemo = nemo_from_hf(hf)
    state, expected = (hf, nemo) if direction == "from_hf" else (nemo, hf_from_nemo(nemo))
    save_file(state, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert slices["model.step"].get_shape() == []
        found = getattr(ADAPTER, direction)(slices)
        assert_same_tensors(found, expected)
        assert_same_tensors(getattr(ADAPTER, direction)(iter(slices.items())), expected)
        if direction == "to_hf":
            singly = [pair for item in slices.items() for pair in ADAPTER.convert_single_tensor_to_hf(*item)]
            assert_same_tensors(dict(singly), expected)


def lazy_values(state):
    return {name: Lazy(tensor) for name, tensor in state.items()}


def reads(lazy):
    return {name: len(value.read) for name, value in lazy.items()}


def test_a_lazy_value_is_read_once_and_only_after_the_whole_mapping_is_checked(hf):
    lazy = lazy_values(hf)
    assert_same_tensors(ADAPTER.from_hf(lazy), nemo_from_hf(hf))
    assert reads(lazy) == dict.fromkeys(hf, 1)
    last = [name for name in hf if name.endswith("gate_up_proj")][-1]
    lazy = lazy_values({name: hf[name] for name in hf if name != last} | {last: hf[last][:-1]})
    with pytest.raises(TensorShapeError):
        ADAPTER.from_hf(lazy)
    assert reads(lazy) == dict.fromkeys(hf, 0)


def test_a_lazy_native_value_is_read_once_and_an_excluded_one_not_at_all(nemo):
    lazy = lazy_values(nemo)
    assert_same_tensors(ADAPTER.to_hf(lazy), hf_from_nemo(nemo))
    assert reads(lazy) == dict.fromkeys(nemo, 1)
    for name, value in lazy.items():
        ADAPTER.convert_single_tensor_to_hf(name, value)
    assert reads(lazy) == dict.fromkeys(nemo, 2)
    lazy = lazy_values(nemo)
    ADAPTER.to_hf(lazy, exclude_key_regex=r".*moe\.experts.*|.*embed")
    assert reads(lazy) == {name: int("experts" not in name and "embed" not in name) for name in nemo}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "float64", "complex64"])
def test_numbers_that_are_no_weights_are_refused(hf, nemo, dtype):
    value = hf[DOWN].to(getattr(torch, dtype))
    bad = nemo | {NATIVE_DOWN: value.mT}
    calls = [
        (DOWN, lambda: ADAPTER.from_hf(hf | {DOWN: value})),
        (NATIVE_DOWN, lambda: ADAPTER.to_hf(bad)),
        (NATIVE_DOWN, lambda: ADAPTER.to_hf(bad, for_checkpoint_load=True)),
        (NATIVE_DOWN, lambda: ADAPTER.convert_single_tensor_to_hf(NATIVE_DOWN, value.mT)),
    ]
    if dtype == "int8":
        calls.append((DOWN, lambda: ADAPTER.from_hf(hf | {DOWN: Lazy(value)})))
        calls.append((SCALE, lambda: ADAPTER.from_hf(hf | {SCALE: torch.arange(2, 8, dtype=torch.int8)})))
    for tensor, call in calls:
        with pytest.raises(TensorShapeError, match="not converted") as raised:
            call()
        expected = {"tensor": tensor, "found": dtype, "expected": "one of bfloat16, float16, float32"}
        assert {fact: raised.value.facts[fact] for fact in expected} == expected


@pytest.mark.parametrize("value", [None, 1.5, [1, 2], b"bytes", "text"])
def test_a_value_that_is_no_tensor_can_be_no_expert(hf, value):
    with pytest.raises(TensorShapeError, match="no tensor"):
        ADAPTER.from_hf(hf | {DOWN: value})


@pytest.mark.parametrize("value", [None, io.BytesIO(b"state"), {"step": 3}, torch.tensor(3)])
def test_other_names_may_hold_anything(hf, nemo, value):
    name = f"{LAYER}self_attn.core_attention._extra_state"
    assert ADAPTER.from_hf(hf | {name: value})[name] is value
    assert ADAPTER.to_hf(nemo | {name: value})[name] is value
    assert ADAPTER.convert_single_tensor_to_hf(name, value) == [(name, value)]
    assert name not in ADAPTER.to_hf(nemo | {name: value}, exclude_key_regex=r".*_extra_state.*")
    assert ADAPTER.convert_single_tensor_to_hf(name, value, exclude_key_regex=r".*_extra_state.*") == []


def test_an_empty_state_dict_is_an_empty_state_dict():
    assert ADAPTER.from_hf({}) == ADAPTER.from_hf(iter(())) == ADAPTER.to_hf({}) == {}
    assert ADAPTER.get_hf_state_dict_keys({}) == []


#: The regular expression, and the endings of the hf names that it leaves out.
MEANINGS = [
    (r".*moe\.gate.*", ("router.proj.weight", "router.scale")),
    (r".*router.*", ("router.proj.weight", "router.scale", "router.per_expert_scale")),
    (r".*down_projs", ("experts.down_proj", "router.per_expert_scale")),
    (r".*experts\.down_proj$", ("experts.down_proj",)),
    (r".*per_expert_scale", ("router.per_expert_scale",)),
    (r".*gate_and_up_projs$", ("experts.gate_up_proj",)),
    (r".*experts\.gate_up_proj", ("experts.gate_up_proj",)),
    (r".*moe\.experts", ("experts.gate_up_proj", "experts.down_proj", "router.per_expert_scale")),
    (r".*layer_scalar", ("layer_scalar",)),
    (r".*", ("",)),
    (r"", ("",)),
    (r"moe\.gate|per_expert_scale|experts", ()),
    (r".*_extra_state.*", ()),
]


def remaining(endings):
    """By formula: the hf state dict without the names of these endings."""
    return {name: tensor for name, tensor in hf_from_nemo(NEMO).items() if not name.endswith(endings)}


@pytest.mark.parametrize(("regex", "endings"), MEANINGS, ids=[regex for regex, _ in MEANINGS])
def test_every_method_leaves_out_the_same(regex, endings):
    expected = remaining(endings)
    assert_same_tensors(ADAPTER.to_hf(NEMO, exclude_key_regex=regex), expected)
    assert_same_tensors(ADAPTER.to_hf(iter(NEMO.items()), regex), expected)
    singly = [
        pair
        for name, tensor in NEMO.items()
        for pair in ADAPTER.convert_single_tensor_to_hf(name, tensor, exclude_key_regex=regex)
    ]
    assert_same_tensors(dict(singly), expected)
    views = ADAPTER.to_hf(NEMO, exclude_key_regex=regex, for_checkpoint_load=True)
    assert sorted(views) == sorted(expected)


def test_the_match_is_anchored_at_the_start_of_the_whole_name():
    assert list(ADAPTER.to_hf(NEMO, exclude_key_regex=r"layers\.0")) == list(ADAPTER.to_hf(NEMO))
    kept = ADAPTER.to_hf(NEMO, exclude_key_regex=re.escape(LAYER))
    assert kept
    assert not any(name.startswith(LAYER) for name in kept)


@pytest.mark.parametrize("regex", ["(", "*", "[z-a]", r"(?P<a>x)(?P<a>y)"])
def test_a_text_that_is_no_regular_expression_is_refused(regex):
    for call in (
        lambda: ADAPTER.to_hf(NEMO, exclude_key_regex=regex),
        lambda: ADAPTER.convert_single_tensor_to_hf("x", torch.ones(1), exclude_key_regex=regex),
    ):
        with pytest.raises(UsageError, match="not a regular expression") as raised:
            call()
        assert raised.value.facts["found"] == regex
        assert raised.value.hint


def test_a_tensor_that_no_row_explains_can_be_left_out_as_the_refusal_says():
    name = f"{LAYER}moe.experts.down_projs_bias"
    state = {**NEMO, name: torch.ones(6, 10)}
    with pytest.raises(UnknownTensorError) as raised:
        ADAPTER.to_hf(state)
    assert "exclude it" in str(raised.value.hint)
    assert_same_tensors(ADAPTER.to_hf(state, exclude_key_regex=r".*_bias$"), hf_from_nemo(NEMO))
    assert ADAPTER.convert_single_tensor_to_hf(name, state[name], exclude_key_regex=r".*_bias$") == []
    with pytest.raises(UnknownTensorError):
        ADAPTER.convert_single_tensor_to_hf(name, state[name], exclude_key_regex=r".*_scale$")
