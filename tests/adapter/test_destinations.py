"""Destinations: a reader fills the model's own storage, and `from_hf` finishes it, once, whatever happened before."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import destinations
from gemma4_moe.errors import IncompleteExpertsError, UsageError
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = "model.language_model.layers.0."
GATE_UP, DOWN, SCALE = f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj", f"{LAYER}router.per_expert_scale"
NATIVE_GATE_UP, NATIVE_DOWN = f"{LAYER}moe.experts.gate_and_up_projs", f"{LAYER}moe.experts.down_projs"

State = dict[str, torch.Tensor]


@pytest.fixture
def hf() -> State:
    return random_hf_state_dict()


@pytest.fixture
def model(hf: State) -> State:
    """A model's parameters before they are loaded, that require grad."""
    return {name: torch.nn.Parameter(torch.full_like(tensor, -3)) for name, tensor in nemo_from_hf(hf).items()}


@pytest.fixture
def adapter() -> Gemma4MoEStateDictAdapter:
    return Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.float32)


def fill(views: State, hf: State, skip: tuple[str, ...] = ()) -> None:
    """Copy into each destination, outside of any graph, as a checkpoint reader does."""
    with torch.no_grad():
        for name in views.keys() - set(skip):
            views[name].copy_(hf[name])


def test_destinations_are_views_of_the_models_storage(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    assert {name: view.shape for name, view in views.items()} == {name: tensor.shape for name, tensor in hf.items()}
    assert list(views) == adapter.get_hf_state_dict_keys(model)
    for name, native in ((GATE_UP, NATIVE_GATE_UP), (DOWN, NATIVE_DOWN)):
        assert views[name].data_ptr() == model[native].data_ptr()
        assert not views[name].requires_grad
        assert destinations.native_of(views[name]) is model[native]
    assert views[f"{LAYER}router.scale"] is model[f"{LAYER}moe.gate.scale"]
    assert views[f"{LAYER}layer_scalar"] is model[f"{LAYER}layer_scalar"]


def test_the_scale_destination_is_fp32_and_says_that_nothing_was_loaded(
    model: State, adapter: Gemma4MoEStateDictAdapter
) -> None:
    scale = adapter.to_hf(model, for_checkpoint_load=True)[SCALE]
    assert (scale.dtype, scale.shape, scale.device) == (torch.float32, (6,), model[NATIVE_DOWN].device)
    assert bool(scale.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_load_in_place_gives_the_bits_of_a_load_in_memory(
    hf: State, adapter: Gemma4MoEStateDictAdapter, dtype: torch.dtype
) -> None:
    hf[SCALE] = torch.rand(6) + 0.5  # fp32: rounding it to bf16 first would show
    expected = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf, dtype).items()}
    model = {name: torch.nn.Parameter(torch.full_like(tensor, -3)) for name, tensor in expected.items()}
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    found = adapter.from_hf(views)
    assert all(found[name] is parameter for name, parameter in model.items())
    assert_same_tensors(found, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_real_reader_hands_back_the_same_destinations(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter, tmp_path: Path
) -> None:
    save_file(hf, tmp_path / "model.safetensors")
    views = adapter.to_hf(model, for_checkpoint_load=True)
    dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same_tensors(adapter.from_hf(views), nemo_from_hf(hf))


def test_finishing_twice_changes_nothing(hf: State, model: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    for _ in range(3):
        assert_same_tensors(adapter.from_hf(views), nemo_from_hf(hf))
        assert bool((views[SCALE] == 1).all())


def test_destinations_may_be_loaded_again(hf: State, model: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    other = random_hf_state_dict(seed=7)
    for state in (other, hf):
        fill(views, state)
        assert_same_tensors(adapter.from_hf(views), nemo_from_hf(state))


@pytest.mark.parametrize("partly", [False, True])
def test_a_scale_that_was_not_loaded_is_an_error(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter, partly: bool
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf, skip=(SCALE,))
    if partly:
        views[SCALE][:4] = 1.5
    with pytest.raises(RuntimeError, match="Incomplete expert weights: a destination was not loaded") as raised:
        adapter.from_hf(views)
    assert isinstance(raised.value, IncompleteExpertsError)
    assert raised.value.facts["tensor"] == SCALE
    assert raised.value.facts["found"] == f"NaN for {2 if partly else 6} of 6 experts"
    assert torch.equal(model[NATIVE_DOWN].mT, hf[DOWN]), "the tensor was scaled all the same"


def test_a_failed_load_leaves_nothing_behind(hf: State, model: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    with pytest.raises(IncompleteExpertsError):
        adapter.from_hf(views)
    ordinary = {name: tensor.clone() for name, tensor in hf.items()}
    assert_same_tensors(adapter.from_hf(ordinary), nemo_from_hf(hf, torch.float32))
    assert_same_tensors(ordinary, hf)
    fill(views, hf)
    assert_same_tensors(adapter.from_hf(views), nemo_from_hf(hf))


def test_a_load_that_failed_after_one_layer_can_be_finished(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter
) -> None:
    late = "model.language_model.layers.1.router.per_expert_scale"
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf, skip=(late,))
    with pytest.raises(IncompleteExpertsError):
        adapter.from_hf(views)
    fill(views, hf, skip=tuple(views.keys() - {late}))
    assert_same_tensors(adapter.from_hf(views), nemo_from_hf(hf))


@pytest.mark.parametrize("name", [GATE_UP, DOWN, SCALE])
@pytest.mark.parametrize(
    "lose",
    [torch.Tensor.clone, torch.Tensor.detach, lambda view: view.clone().contiguous(), torch.nn.Parameter],
    ids=["clone", "detach", "contiguous", "Parameter"],
)
@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_destination_beside_an_ordinary_tensor_of_its_layer_is_refused(
    hf: State,
    model: State,
    adapter: Gemma4MoEStateDictAdapter,
    name: str,
    lose: Callable[[torch.Tensor], torch.Tensor],
    as_iterator: bool,
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    before = model[NATIVE_DOWN].detach().clone()
    mixed = views | {name: lose(views[name])}
    with pytest.raises(UsageError, match="both destinations and ordinary tensors"):
        adapter.from_hf(iter(mixed.items()) if as_iterator else mixed)
    if not as_iterator or name != GATE_UP:
        assert torch.equal(model[NATIVE_DOWN], before)


def test_one_layer_of_destinations_beside_one_of_ordinary_tensors_is_fine(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    second = {name: hf[name].clone() for name in hf if "layers.1." in name}
    found = adapter.from_hf(views | second)
    expected = nemo_from_hf(hf)
    wide = nemo_from_hf(hf, torch.float32)
    assert_same_tensors(found, expected | {name: wide[name] for name in wide if "layers.1.moe.experts" in name})
    assert found[NATIVE_DOWN] is model[NATIVE_DOWN]
    assert_same_tensors(second, {name: hf[name] for name in second})


def test_a_whole_layer_of_copies_is_an_ordinary_layer(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    before = {name: tensor.detach().clone() for name, tensor in model.items()}
    found = adapter.from_hf({name: view.clone() for name, view in views.items()})
    assert_same_tensors(model, before)
    expected = nemo_from_hf(hf, torch.float32)
    assert_same_tensors({name: found[name] for name in (NATIVE_GATE_UP, NATIVE_DOWN)}, {
        name: expected[name] for name in (NATIVE_GATE_UP, NATIVE_DOWN)
    })  # fmt: skip


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda views: pickle.loads(pickle.dumps(views))])
@pytest.mark.parametrize("together", [True, False])
def test_a_copy_with_storage_of_its_own_is_no_destination(
    hf: State,
    model: State,
    adapter: Gemma4MoEStateDictAdapter,
    copied: Callable[[Any], Any],
    together: bool,
) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    copies = copied(views) if together else {name: copied(view) for name, view in views.items()}
    fill(copies, hf)
    assert_same_tensors(adapter.from_hf(copies), nemo_from_hf(hf, torch.float32))
    assert bool((model[NATIVE_DOWN] == -3).all())


def test_strided_storage_is_filled_and_scaled_where_it_lies(hf: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    expected = nemo_from_hf(hf)
    whole = {name: torch.full((*tensor.shape, 3), -3, dtype=tensor.dtype) for name, tensor in expected.items()}
    model = {name: tensor[..., 1] for name, tensor in whole.items()}
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    assert_same_tensors(adapter.from_hf(views), expected)
    assert all(bool((tensor[..., [0, 2]] == -3).all()) for tensor in whole.values())


@pytest.mark.parametrize("value", [float("inf"), 0.0, -0.75])
def test_a_loaded_scale_is_folded_as_it_is(
    hf: State, model: State, adapter: Gemma4MoEStateDictAdapter, value: float
) -> None:
    hf[SCALE][2] = value
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    assert_same_tensors(adapter.from_hf(views), nemo_from_hf(hf))


def test_destinations_do_not_keep_a_model_alive(hf: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    model = nemo_from_hf(hf)
    dead = weakref.ref(model[NATIVE_DOWN])
    gc.disable()
    try:
        views = adapter.to_hf(model, for_checkpoint_load=True)
        fill(views, hf)
        adapter.from_hf(views)
        del model, views
        assert dead() is None
    finally:
        gc.enable()


def test_meta_models_have_meta_destinations(model: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    views = adapter.to_hf({name: tensor.to("meta") for name, tensor in model.items()}, for_checkpoint_load=True)
    assert {view.device.type for view in views.values()} == {"meta"}


def test_an_ordinary_tensor_is_no_destination() -> None:
    assert destinations.native_of(torch.ones(2)) is None
    assert destinations.native_of(None) is None
    native = torch.ones(3, 2, 4)
    marked = destinations.mark(native.mT, native)
    assert destinations.native_of(marked) is native
    assert destinations.native_of(marked[0]) is None


def test_a_destination_and_out_exclude_each_other(hf: State, model: State, adapter: Gemma4MoEStateDictAdapter) -> None:
    views = adapter.to_hf(model, for_checkpoint_load=True)
    fill(views, hf)
    out = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    with pytest.raises(UsageError, match="own storage"):
        adapter.from_hf(views, out=out)
