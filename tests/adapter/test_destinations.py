"""Destinations: a reader fills the model's own storage, and `from_hf` finishes it, once, whatever happened before."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import destinations
from gemma4_moe.errors import IncompleteExpertsError, InputError, UsageError
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import DOWN, GATE_UP, LAYER, NATIVE_DOWN, NATIVE_GATE_UP, SCALE, random_hf_state_dict

State = dict[str, torch.Tensor]
ADAPTER = Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.float32)


def unloaded(state):
    """A model's parameters before they are loaded, that require grad."""
    return {name: torch.nn.Parameter(torch.full_like(tensor, -3)) for name, tensor in state.items()}


@pytest.fixture
def model(nemo):
    return unloaded(nemo)


@pytest.fixture
def views(model):
    return ADAPTER.to_hf(model, for_checkpoint_load=True)


@pytest.fixture
def filled(views, hf):
    return fill(views, hf)


def fill(views, hf, skip=()):
    """Copy into each destination, outside of any graph, as a checkpoint reader does."""
    with torch.no_grad():
        for name in views.keys() - set(skip):
            views[name].copy_(hf[name])
    return views


def test_destinations_are_views_of_the_models_storage(hf, model, views):
    assert {name: view.shape for name, view in views.items()} == {name: tensor.shape for name, tensor in hf.items()}
    assert list(views) == ADAPTER.get_hf_state_dict_keys(model)
    for name, native in ((GATE_UP, NATIVE_GATE_UP), (DOWN, NATIVE_DOWN)):
        assert views[name].data_ptr() == model[native].data_ptr()
        assert not views[name].requires_grad
        assert destinations.native_of(views[name]) is model[native]
    assert views[f"{LAYER}router.scale"] is model[f"{LAYER}moe.gate.scale"]
    assert views[f"{LAYER}layer_scalar"] is model[f"{LAYER}layer_scalar"]
    scale = views[SCALE]
    assert (scale.dtype, scale.shape, scale.device) == (torch.float32, (6,), model[NATIVE_DOWN].device)
    assert bool(scale.isnan().all()), "what says that nothing was loaded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_load_in_place_gives_the_bits_of_a_load_in_memory(hf, dtype):
    hf[SCALE] = torch.rand(6) + 0.5  # fp32: rounding it to bf16 first would show
    hf[SCALE][:3] = torch.tensor([float("inf"), 0.0, -0.75])
    expected = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf, dtype).items()}
    model = unloaded(expected)
    found = ADAPTER.from_hf(fill(ADAPTER.to_hf(model, for_checkpoint_load=True), hf))
    assert all(found[name] is parameter for name, parameter in model.items())
    assert_same_tensors(found, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_real_reader_hands_back_the_same_destinations(hf, nemo, views, tmp_path):
    save_file(hf, tmp_path / "model.safetensors")
    dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same_tensors(ADAPTER.from_hf(views), nemo)


def test_destinations_may_be_loaded_again(hf, views):
    for state in (random_hf_state_dict(seed=7), hf):
        assert_same_tensors(ADAPTER.from_hf(fill(views, state)), nemo_from_hf(state))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scale_that_is_nan_in_the_file_is_told_from_one_that_was_not_loaded(dtype, hf, views, tmp_path):
    hf[SCALE] = hf[SCALE].to(dtype)
    hf[SCALE][2:5] = float("nan")
    save_file(hf, tmp_path / "model.safetensors")
    dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    with pytest.raises(InputError, match="NaN in the checkpoint") as raised:
        ADAPTER.from_hf(views)
    assert raised.value.facts["tensor"] == SCALE
    assert raised.value.facts["found"] == "NaN for 3 of 6 experts"


@pytest.mark.parametrize("partly", [False, True])
def test_a_scale_that_was_not_loaded_is_an_error(hf, model, views, partly):
    fill(views, hf, skip=(SCALE,))
    if partly:
        views[SCALE][:4] = 1.5
    with pytest.raises(RuntimeError, match="Incomplete expert weights: a destination was not loaded") as raised:
        ADAPTER.from_hf(views)
    assert isinstance(raised.value, IncompleteExpertsError)
    assert raised.value.facts["tensor"] == SCALE
    assert raised.value.facts["found"] == f"none for {2 if partly else 6} of 6 experts"
    assert torch.equal(model[NATIVE_DOWN].mT, hf[DOWN]), "the tensor was scaled all the same"


@pytest.mark.parametrize("late", [(), ("model.language_model.layers.1.router.per_expert_scale",)])
def test_a_failed_load_leaves_nothing_behind_and_can_be_finished(hf, nemo, views, late):
    if late:
        fill(views, hf, skip=late)
    with pytest.raises(IncompleteExpertsError):
        ADAPTER.from_hf(views)
    ordinary = {name: tensor.clone() for name, tensor in hf.items()}
    assert_same_tensors(ADAPTER.from_hf(ordinary), nemo_from_hf(hf, torch.float32))
    assert_same_tensors(ordinary, hf)
    fill(views, hf, skip=tuple(views.keys() - set(late)) if late else ())
    assert_same_tensors(ADAPTER.from_hf(views), nemo)


@pytest.mark.parametrize("name", [GATE_UP, DOWN, SCALE])
@pytest.mark.parametrize(
    "lose",
    [torch.Tensor.clone, torch.Tensor.detach, lambda view: view.clone().contiguous(), torch.nn.Parameter],
    ids=["clone", "detach", "contiguous", "Parameter"],
)
@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_destination_beside_an_ordinary_tensor_of_its_layer_is_refused(model, filled, name, lose, as_iterator):
    before = model[NATIVE_DOWN].detach().clone()
    mixed = filled | {name: lose(filled[name])}
    with pytest.raises(UsageError, match="both destinations and ordinary tensors"):
        ADAPTER.from_hf(iter(mixed.items()) if as_iterator else mixed)
    if not as_iterator or name != GATE_UP:
        assert torch.equal(model[NATIVE_DOWN], before)


def test_one_layer_of_destinations_beside_one_of_ordinary_tensors_is_fine(hf, nemo, model, filled):
    second = {name: hf[name].clone() for name in hf if "layers.1." in name}
    found = ADAPTER.from_hf(filled | second)
    wide = nemo_from_hf(hf, torch.float32)
    assert_same_tensors(found, nemo | {name: wide[name] for name in wide if "layers.1.moe.experts" in name})
    assert found[NATIVE_DOWN] is model[NATIVE_DOWN]
    assert_same_tensors(second, {name: hf[name] for name in second})


@pytest.mark.parametrize(
    "copied",
    [
        lambda views: {name: view.clone() for name, view in views.items()},
        lambda views: {name: copy.deepcopy(view) for name, view in views.items()},
        lambda views: {name: pickle.loads(pickle.dumps(view)) for name, view in views.items()},
        copy.deepcopy,
        lambda views: pickle.loads(pickle.dumps(views)),
    ],
    ids=["clone", "deepcopy", "pickle", "deepcopy of all", "pickle of all"],
)
def test_a_copy_with_storage_of_its_own_is_no_destination(hf, model, views, copied):
    found = ADAPTER.from_hf(fill(copied(views), hf))
    assert_same_tensors(found, nemo_from_hf(hf, torch.float32))
    assert all(bool((tensor == -3).all()) for tensor in model.values())


def test_strided_storage_is_filled_and_scaled_where_it_lies(hf, nemo):
    whole = {name: torch.full((*tensor.shape, 3), -3, dtype=tensor.dtype) for name, tensor in nemo.items()}
    model = {name: tensor[..., 1] for name, tensor in whole.items()}
    assert_same_tensors(ADAPTER.from_hf(fill(ADAPTER.to_hf(model, for_checkpoint_load=True), hf)), nemo)
    assert all(bool((tensor[..., [0, 2]] == -3).all()) for tensor in whole.values())


def test_destinations_do_not_keep_a_model_alive(hf):
    model = nemo_from_hf(hf)
    dead = weakref.ref(model[NATIVE_DOWN])
    gc.disable()
    try:
        views = ADAPTER.to_hf(model, for_checkpoint_load=True)
        ADAPTER.from_hf(fill(views, hf))
        del model, views
        assert dead() is None
    finally:
        gc.enable()


def test_meta_models_have_meta_destinations(nemo):
    views = ADAPTER.to_hf({name: tensor.to("meta") for name, tensor in nemo.items()}, for_checkpoint_load=True)
    assert {view.device.type for view in views.values()} == {"meta"}


def test_an_ordinary_tensor_is_no_destination():
    assert destinations.native_of(torch.ones(2)) is None
    assert destinations.native_of(None) is None
    native = torch.ones(3, 2, 4)
    marked = destinations.mark(native.mT, native)
    assert destinations.native_of(marked) is native
    assert destinations.native_of(marked[0]) is None


def test_a_destination_and_out_exclude_each_other(model, filled):
    with pytest.raises(UsageError, match="own storage"):
        ADAPTER.from_hf(filled, out={name: torch.zeros_like(tensor) for name, tensor in model.items()})
