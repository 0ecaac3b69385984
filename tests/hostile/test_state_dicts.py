"""State dicts that are not what they seem: each is refused by the tensor's name, none is guessed at."""

from types import SimpleNamespace

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import (
    ConfigError,
    DuplicateTensorError,
    IncompleteExpertsError,
    TensorShapeError,
    UnknownTensorError,
    UsageError,
)
from support.formulas import (
    assert_same_tensors,
    legacy_name,
    nemo_from_hf,
)
from support.models import random_hf_state_dict

P = "model.language_model."
LAYER = f"{P}layers.0."
GATE_UP, DOWN, SCALE = f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj", f"{LAYER}router.per_expert_scale"
NATIVE_GATE_UP, NATIVE_DOWN = f"{LAYER}moe.experts.gate_and_up_projs", f"{LAYER}moe.experts.down_projs"


def adapter():
    return Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.bfloat16)


@pytest.fixture
def hf():
    return random_hf_state_dict()


@pytest.fixture
def nemo(hf):
    return nemo_from_hf(hf)


@pytest.mark.parametrize("missing", [GATE_UP, DOWN, SCALE])
@pytest.mark.parametrize("as_iterator", [False, True])
def test_an_incomplete_layer_is_refused_in_the_words_that_callers_match(hf, missing, as_iterator):
    del hf[missing]
    with pytest.raises(RuntimeError, match="Incomplete expert weights for layer 0") as raised:
        adapter().from_hf(iter(hf.items()) if as_iterator else hf)
    assert isinstance(raised.value, IncompleteExpertsError)
    assert raised.value.facts["tensor"] == missing


@pytest.mark.parametrize("missing", [NATIVE_GATE_UP, NATIVE_DOWN])
@pytest.mark.parametrize("as_iterator", [False, True])
def test_half_of_a_native_layer_is_refused(nemo, missing, as_iterator):
    del nemo[missing]
    with pytest.raises(RuntimeError, match="Incomplete expert weights for layer 0") as raised:
        adapter().to_hf(iter(nemo.items()) if as_iterator else nemo)
    assert raised.value.facts["tensor"] == missing


def test_a_mapping_is_checked_before_any_of_it_is_read(hf):
    del hf[f"{P}layers.1.router.per_expert_scale"]
    with pytest.raises(IncompleteExpertsError):
        adapter().from_hf({name: Unread(tensor) for name, tensor in hf.items()})


class Unread:
    """A lazy value that must not be read."""

    def __init__(self, tensor):
        self._shape = list(tensor.shape)

    def get_shape(self):
        return self._shape

    def get_dtype(self):
        return "BF16"

    def __getitem__(self, key):
        raise AssertionError("read before all of the state dict was checked")


def test_a_name_that_only_contains_the_experts_name_is_no_expert(nemo):
    for name in (f"{NATIVE_DOWN}_bias", f"{NATIVE_GATE_UP}_bias", f"{NATIVE_DOWN}.weight"):
        with pytest.raises(UnknownTensorError) as raised:
            adapter().to_hf(nemo | {name: torch.zeros(6, 10)})
        assert raised.value.facts["tensor"] == name
        with pytest.raises(UnknownTensorError):
            adapter().convert_single_tensor_to_hf(name, torch.zeros(6, 10))
        with pytest.raises(UnknownTensorError):
            adapter().get_hf_state_dict_keys([*nemo.items(), (name, None)])


def test_both_spellings_of_one_tensor_are_refused_even_if_they_are_equal(hf):
    for name in (GATE_UP, DOWN, SCALE):
        for state in ({**hf, legacy_name(name): hf[name]}, {legacy_name(name): hf[name], **hf}):
            with pytest.raises(DuplicateTensorError, match="two spellings"):
                adapter().from_hf(state)
            with pytest.raises(DuplicateTensorError, match="two spellings"):
                adapter().from_hf(iter(state.items()))


@pytest.mark.parametrize("name", ["norm.weight", SCALE, DOWN, f"{LAYER}router.scale"])
def test_one_name_twice_in_an_iterator_is_refused(hf, name):
    entries = [*hf.items(), ("norm.weight", torch.ones(3)), (name, hf.get(name, torch.ones(3)))]
    with pytest.raises(DuplicateTensorError, match="one name"):
        adapter().from_hf(iter(entries))


@pytest.mark.parametrize(
    "rest",
    [
        "experts.0.down_proj.weight_scale",
        "experts.5.up_proj.weight_packed",
        "experts.5.up_proj.weight_scale_2",
        "experts.base_layer.lora_A.weight",
        "experts.lora_B.weight",
    ],
)
def test_quantised_and_lora_keys_do_not_pass_unconverted(hf, rest):
    with pytest.raises(UnknownTensorError) as raised:
        adapter().from_hf(hf | {LAYER + rest: torch.ones(7, 10)})
    assert raised.value.facts["tensor"] == LAYER + rest


@pytest.mark.parametrize("rest", ["experts.0.gate_proj.weight", "moe.experts.3.down_proj.weight"])
def test_a_single_expert_beside_the_fused_ones_is_refused(hf, rest):
    with pytest.raises(DuplicateTensorError, match="two spellings") as raised:
        adapter().from_hf(hf | {LAYER + rest: torch.ones(7, 10, dtype=torch.bfloat16)})
    assert raised.value.facts["tensor"] == LAYER + rest


@pytest.mark.parametrize("rest", ["lora_gate_A", "lora_down_B.default", "lora_magnitude", "0.down_proj.weight"])
def test_other_lora_than_nemos_and_per_expert_native_keys_do_not_pass_unconverted(nemo, rest):
    with pytest.raises(UnknownTensorError):
        adapter().to_hf(nemo | {f"{LAYER}moe.experts.{rest}": torch.ones(6, 10, 2)})


def test_a_state_dict_of_the_other_layout_is_refused(hf, nemo):
    with pytest.raises(UnknownTensorError, match="name of the nemo layout"):
        adapter().from_hf(nemo)
    with pytest.raises(UnknownTensorError, match="name of the hf layout"):
        adapter().to_hf(hf)


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_a_transposed_tensor_is_refused(hf, name):
    with pytest.raises(TensorShapeError, match="wrong shape"):
        adapter().from_hf(hf | {name: hf[name].mT})
    with pytest.raises(TensorShapeError, match="wrong shape"):
        adapter().from_hf({name: hf[name].mT} | {other: value for other, value in hf.items() if other != name})


def test_where_H_is_2I_a_transposed_gate_up_proj_has_the_right_shape_and_is_taken_at_its_word():  # noqa: N802
    hf = random_hf_state_dict(H=14, I=7)
    assert hf[GATE_UP].mT.shape == hf[GATE_UP].shape
    found = adapter().from_hf(hf | {GATE_UP: hf[GATE_UP].mT.contiguous()})
    assert torch.equal(found[NATIVE_GATE_UP], hf[GATE_UP])
    assert_same_tensors(adapter().from_hf(hf), nemo_from_hf(hf))
    with pytest.raises(TensorShapeError):
        adapter().from_hf(hf | {DOWN: hf[DOWN].mT})


@pytest.mark.parametrize(
    "configured",
    [
        (None, MoEConfig(8)),
        (None, MoEConfig(3)),
        (SimpleNamespace(num_experts=8), None),
        (SimpleNamespace(hidden_size=14), MoEConfig(6)),
        (SimpleNamespace(moe_intermediate_size=14), MoEConfig(6)),
    ],
)
def test_a_checkpoint_of_other_sizes_than_the_configs_is_refused_though_it_agrees_with_itself(hf, nemo, configured):
    sized = Gemma4MoEStateDictAdapter(*configured, None)
    for call in (lambda: sized.from_hf(hf), lambda: sized.to_hf(nemo)):
        with pytest.raises(TensorShapeError) as raised:
            call()
        assert "from the config" in raised.value.facts["expected"]
    for name in (NATIVE_GATE_UP, NATIVE_DOWN):
        if configured[1] != MoEConfig(6) or name == NATIVE_GATE_UP:
            with pytest.raises(TensorShapeError):
                sized.convert_single_tensor_to_hf(name, nemo[name])


def test_configs_that_disagree_are_refused_at_once():
    with pytest.raises(ConfigError, match="disagree about E"):
        Gemma4MoEStateDictAdapter(SimpleNamespace(num_experts=6), MoEConfig(8), None)
    with pytest.raises(UsageError, match="unknown kernel"):
        Gemma4MoEStateDictAdapter(None, None, SimpleNamespace(conversion="fast"))


def test_quantised_output_is_refused(nemo):
    for call in (
        lambda: adapter().to_hf(nemo, quantization=True),
        lambda: adapter().convert_single_tensor_to_hf(NATIVE_DOWN, nemo[NATIVE_DOWN], quantization=True),
    ):
        with pytest.raises(UsageError, match="not supported") as raised:
            call()
        assert raised.value.facts["expected"] == "quantization=False"


@pytest.mark.parametrize("name", [NATIVE_DOWN, NATIVE_GATE_UP, f"{LAYER}moe.gate.scale", f"{LAYER}layer_scalar"])
def test_out_of_another_model_is_refused_by_name(hf, name):
    out = {key: torch.empty_like(tensor) for key, tensor in nemo_from_hf(hf).items()}
    with pytest.raises(TensorShapeError, match="write into") as raised:
        adapter().from_hf(hf, out=out | {name: torch.empty(2, *out[name].shape)})
    assert raised.value.facts["tensor"] == name
    assert raised.value.facts["expected"] == str(list(out[name].shape))
    del out[name]
    with pytest.raises(UsageError, match="no tensor to write into") as missing:
        adapter().from_hf(hf, out=out)
    assert missing.value.facts["tensor"] == name
