"""Our adapter against NeMo AutoModel's own, as a black box, wherever theirs has one right answer."""

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from support import peer
from support.formulas import assert_same_tensors, exact_fold, nemo_from_hf
from support.models import random_hf_state_dict

#: E, H, I, layers, seed.
Sizes = tuple[int, int, int, int, int]
MODELS = [(6, 10, 7, 2, 0), (5, 8, 13, 1, 1), (3, 33, 9, 12, 2), (1, 4, 3, 2, 3)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
PREFIX = "model.language_model."


def ours(dtype):
    return Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)


def hf_state_dict(sizes, dtype):
    E, H, I, layers, seed = sizes  # noqa: E741
    return random_hf_state_dict(E=E, H=H, I=I, layers=layers, seed=seed, dtype=dtype)


@pytest.mark.parametrize(
    ("file", "model"), [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("sizes", MODELS, ids=str)
def test_from_hf_has_their_bits(sizes, file, model):
    hf = hf_state_dict(sizes, file)
    assert_same_tensors(ours(model).from_hf(hf), peer.adapter(*sizes[:3], model).from_hf(dict(hf)))


@pytest.mark.parametrize("sizes", MODELS, ids=str)
def test_bf16_to_fp32_is_exact_where_theirs_has_two_answers(sizes):
    hf = hf_state_dict(sizes, torch.bfloat16)
    found = ours(torch.float32).from_hf(hf)
    whole = peer.adapter(*sizes[:3], torch.float32).from_hf(dict(hf))
    in_place = _loaded_in_place(peer.adapter(*sizes[:3], torch.float32), hf)
    for layer in range(sizes[3]):
        path = f"{PREFIX}layers.{layer}."
        exact = exact_fold(hf[f"{path}experts.down_proj"], hf[f"{path}router.per_expert_scale"])
        down = f"{path}moe.experts.down_projs"
        assert torch.equal(found[down].double(), exact)
        assert torch.equal(in_place[down].double(), exact)
        assert not torch.equal(whole[down].double(), exact), "theirs has become exact: compare with it directly"


def _loaded_in_place(adapter, hf):
    """What an adapter makes of a checkpoint that is read into its own destinations."""
    model = {name: torch.full_like(tensor, -3, dtype=adapter.dtype) for name, tensor in nemo_from_hf(hf).items()}
    destinations = adapter.to_hf(model, for_checkpoint_load=True)
    assert sorted(destinations) == sorted(hf)
    with torch.no_grad():
        for name, tensor in hf.items():
            destinations[name].copy_(tensor)
    return adapter.from_hf(destinations)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MODELS, ids=str)
def test_to_hf_and_its_keys_are_theirs(sizes, dtype):
    nemo = nemo_from_hf(hf_state_dict(sizes, dtype))
    found = ours(dtype).to_hf(nemo)
    peers = peer.adapter(*sizes[:3], dtype)
    theirs = peers.to_hf(nemo)
    assert list(found) == list(theirs)
    for state in (nemo, {name: tensor.to("meta") for name, tensor in nemo.items()}):
        assert ours(dtype).get_hf_state_dict_keys(state) == peers.get_hf_state_dict_keys(nemo)
    assert_same_tensors(found, theirs)
    assert {name: tensor.is_contiguous() for name, tensor in found.items()} == dict.fromkeys(theirs, True)
    assert {name for name in found if found[name] is theirs[name]} == {
        name for name in theirs if not name.endswith(("gate_up_proj", "experts.down_proj", "per_expert_scale"))
    }


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convert_single_tensor_to_hf_is_theirs(dtype, adapter_dtype):
    nemo = nemo_from_hf(hf_state_dict(MODELS[0], dtype))
    theirs = peer.adapter(*MODELS[0][:3], adapter_dtype)
    for name, tensor in nemo.items():
        expected = theirs.convert_single_tensor_to_hf(name, tensor)
        found = ours(adapter_dtype).convert_single_tensor_to_hf(name, tensor)
        assert [hf for hf, _ in found] == [hf for hf, _ in expected]
        assert_same_tensors(dict(found), dict(expected))


@pytest.mark.parametrize(
    "regex",
    [
        r".*moe\.gate.*",
        r".*moe\.experts.*",
        r".*down_projs",
        r".*router.*",
        r".*per_expert_scale",
        r".*experts\.down_proj$",
        r".*layer_scalar",
        r".*_extra_state.*",
        r"per_expert_scale",
    ],
)
def test_exclude_key_regex_unites_their_two_meanings(regex):
    nemo = nemo_from_hf(hf_state_dict(MODELS[0], torch.bfloat16))
    theirs = peer.adapter(*MODELS[0][:3], torch.bfloat16)
    by_hf_name = set(theirs.to_hf(nemo, exclude_key_regex=regex))
    by_native_name = set(_singly(theirs, nemo, regex))
    assert set(ours(torch.bfloat16).to_hf(nemo, exclude_key_regex=regex)) == by_hf_name & by_native_name
    assert set(_singly(ours(torch.bfloat16), nemo, regex)) == by_hf_name & by_native_name


def _singly(adapter, nemo, regex):
    return [
        hf
        for name, tensor in nemo.items()
        for hf, _ in adapter.convert_single_tensor_to_hf(name, tensor, exclude_key_regex=regex, quantization=False)
    ]


@pytest.mark.parametrize("missing", ["experts.gate_up_proj", "experts.down_proj", "router.per_expert_scale"])
def test_an_incomplete_layer_raises_what_their_callers_expect(missing):
    hf = {k: v for k, v in hf_state_dict(MODELS[0], torch.bfloat16).items() if not k.endswith(f"layers.1.{missing}")}
    for adapter in (peer.adapter(*MODELS[0][:3], torch.bfloat16), ours(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="Incomplete expert weights"):
            adapter.from_hf(dict(hf))
