"""How the adapter takes in a state dict: in any order, one by one, lazily, and not before it has to."""

from __future__ import annotations

import gc
import io
import random
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import TensorShapeError
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LAYER = "model.language_model.layers.0."
ADAPTER = Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.bfloat16)


@pytest.fixture
def hf() -> dict[str, torch.Tensor]:
    return random_hf_state_dict()


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_entries_changes_only_the_order_of_results(hf: dict[str, torch.Tensor], seed: int) -> None:
    names = list(hf)
    random.Random(seed).shuffle(names)
    assert_same_tensors(ADAPTER.from_hf((name, hf[name]) for name in names), nemo_from_hf(hf))
    assert_same_tensors(ADAPTER.from_hf({name: hf[name] for name in names}), nemo_from_hf(hf))


@pytest.mark.parametrize("scale_first", [False, True])
def test_scale_and_down_proj_find_each_other_across_interleaved_layers(
    hf: dict[str, torch.Tensor], scale_first: bool
) -> None:
    def place(name: str) -> tuple[bool, str]:
        return name.endswith("per_expert_scale") is not scale_first, name[::-1]

    names = sorted(hf, key=place)
    assert names[0].endswith("per_expert_scale") is scale_first
    assert_same_tensors(ADAPTER.from_hf((name, hf[name]) for name in names), nemo_from_hf(hf))


class Nursery:
    """Makes fresh copies of a state dict's tensors, and knows which of them are still alive."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state
        self._made: dict[str, weakref.ref[torch.Tensor]] = {}
        self.alive: list[set[str]] = []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state.items():
            self.alive.append({made for made, reference in self._made.items() if reference() is not None})
            yield name, self._make(name, tensor)

    def _make(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        self._made[name] = weakref.ref(made)
        return made


def test_expert_tensors_of_an_iterator_are_released_before_the_next_is_asked_for(hf: dict[str, torch.Tensor]) -> None:
    gc.disable()
    try:
        experts = {name: tensor for name, tensor in hf.items() if "expert" in name}
        assert len(experts) == 6
        names = sorted(experts, key=lambda name: (name.split("layers.")[1][0], "scale" in name, "gate" in name))
        nursery = Nursery({name: experts[name] for name in names})
        ADAPTER.from_hf(iter(nursery))
    finally:
        gc.enable()
    down = [f"model.language_model.layers.{layer}.experts.down_proj" for layer in range(2)]
    assert nursery.alive == [set(), {down[0]}, {down[0]}, set(), {down[1]}, {down[1]}]


def test_native_tensors_of_an_iterator_are_released_before_the_next_is_asked_for(hf: dict[str, torch.Tensor]) -> None:
    gc.disable()
    try:
        nursery = Nursery({name: tensor for name, tensor in nemo_from_hf(hf).items() if "moe.experts" in name})
        found = ADAPTER.to_hf(iter(nursery))
    finally:
        gc.enable()
    assert nursery.alive == [set()] * 4
    expected = hf_from_nemo(nemo_from_hf(hf))
    assert_same_tensors(found, {name: tensor for name, tensor in expected.items() if "expert" in name})


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_lazy_slices_of_a_file_give_what_tensors_give(
    hf: dict[str, torch.Tensor], tmp_path: Path, direction: str
) -> None:
    hf["model.step"] = torch.tensor(7, dtype=torch.int64)
    state, expected = (hf, nemo_from_hf(hf)) if direction == "from_hf" else (nemo_from_hf(hf), None)
    expected = expected or hf_from_nemo(state)
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


class Recorded:
    """A lazy value that says what was done to it, in the protocol of safetensors' slices."""

    def __init__(self, name: str, tensor: torch.Tensor, log: list[str]) -> None:
        self._name, self._tensor, self._log = name, tensor, log

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return {torch.bfloat16: "BF16", torch.int8: "I8", torch.float32: "F32"}[self._tensor.dtype]

    def __getitem__(self, key: Any) -> torch.Tensor:
        self._log.append(self._name)
        return self._tensor[key]


def test_a_lazy_value_is_read_once_and_only_after_the_whole_mapping_is_checked(hf: dict[str, torch.Tensor]) -> None:
    log: list[str] = []
    lazy = {name: Recorded(name, tensor, log) for name, tensor in hf.items()}
    assert_same_tensors(ADAPTER.from_hf(lazy), nemo_from_hf(hf))
    assert sorted(log) == sorted(hf)
    log.clear()
    last = list(lazy)[-1]
    with pytest.raises(TensorShapeError):
        ADAPTER.from_hf(lazy | {last: Recorded(last, hf[last][:-1], log)})
    assert log == []


def test_a_lazy_native_value_is_read_once(hf: dict[str, torch.Tensor]) -> None:
    log: list[str] = []
    nemo = nemo_from_hf(hf)
    lazy = {name: Recorded(name, tensor, log) for name, tensor in nemo.items()}
    assert_same_tensors(ADAPTER.to_hf(lazy), hf_from_nemo(nemo))
    assert sorted(log) == sorted(nemo)
    log.clear()
    for name, value in lazy.items():
        ADAPTER.convert_single_tensor_to_hf(name, value)
    assert sorted(log) == sorted(nemo)


def test_an_excluded_lazy_value_is_not_read(hf: dict[str, torch.Tensor]) -> None:
    log: list[str] = []
    lazy = {name: Recorded(name, tensor, log) for name, tensor in nemo_from_hf(hf).items()}
    ADAPTER.to_hf(lazy, exclude_key_regex=r".*moe\.experts.*|.*embed")
    assert [name for name in log if "experts" in name or "embed" in name] == []
    assert len(log) == len(lazy) - 5


def wrong_dtypes(hf: dict[str, torch.Tensor]) -> dict[str, Any]:
    down = hf[f"{LAYER}experts.down_proj"]
    return {
        "float8_e4m3fn": down.to(torch.float8_e4m3fn),
        "int8": down.to(torch.int8),
        "uint8": down.to(torch.uint8),
        "float64": down.double(),
        "complex64": down.to(torch.complex64),
        "lazy int8": Recorded("down", down.to(torch.int8), []),
    }


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8", "uint8", "float64", "complex64", "lazy int8"])
def test_numbers_that_are_no_weights_are_refused(hf: dict[str, torch.Tensor], kind: str) -> None:
    name, native = f"{LAYER}experts.down_proj", f"{LAYER}moe.experts.down_projs"
    value = wrong_dtypes(hf)[kind]
    calls: list[tuple[str, Callable[[], Any]]] = [(name, lambda: ADAPTER.from_hf(hf | {name: value}))]
    if isinstance(value, torch.Tensor):
        nemo = nemo_from_hf(hf)
        calls += [
            (native, lambda: ADAPTER.to_hf(nemo | {native: value.mT})),
            (native, lambda: ADAPTER.to_hf(nemo | {native: value.mT}, for_checkpoint_load=True)),
            (native, lambda: ADAPTER.convert_single_tensor_to_hf(native, value.mT)),
        ]
    for tensor, call in calls:
        with pytest.raises(TensorShapeError, match="not converted") as raised:
            call()
        assert raised.value.facts["tensor"] == tensor
        assert raised.value.facts["found"] == kind.split()[-1]
        assert raised.value.facts["expected"] == "one of bfloat16, float16, float32"


def test_a_scale_of_integers_is_refused(hf: dict[str, torch.Tensor]) -> None:
    name = f"{LAYER}router.per_expert_scale"
    with pytest.raises(TensorShapeError, match="not converted"):
        ADAPTER.from_hf(hf | {name: torch.tensor([2, 3, 4, 5, 6, 7])})


@pytest.mark.parametrize("value", [None, 1.5, [1, 2], b"bytes", "text"])
def test_a_value_that_is_no_tensor_can_be_no_expert(hf: dict[str, torch.Tensor], value: object) -> None:
    with pytest.raises(TensorShapeError, match="no tensor"):
        ADAPTER.from_hf(hf | {f"{LAYER}experts.down_proj": value})


@pytest.mark.parametrize("value", [None, io.BytesIO(b"state"), {"step": 3}, torch.tensor(3)])
def test_other_names_may_hold_anything(hf: dict[str, torch.Tensor], value: object) -> None:
    name = f"{LAYER}self_attn.core_attention._extra_state"
    nemo = nemo_from_hf(hf)
    assert ADAPTER.from_hf(hf | {name: value})[name] is value
    assert ADAPTER.to_hf(nemo | {name: value})[name] is value
    assert ADAPTER.convert_single_tensor_to_hf(name, value) == [(name, value)]
    assert name not in ADAPTER.to_hf(nemo | {name: value}, exclude_key_regex=r".*_extra_state.*")
    assert ADAPTER.convert_single_tensor_to_hf(name, value, exclude_key_regex=r".*_extra_state.*") == []


def test_an_empty_state_dict_is_an_empty_state_dict() -> None:
    assert ADAPTER.from_hf({}) == ADAPTER.from_hf(iter(())) == ADAPTER.to_hf({}) == {}
    assert ADAPTER.get_hf_state_dict_keys({}) == []
