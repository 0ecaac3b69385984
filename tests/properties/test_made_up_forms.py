"""A form of the hf layout is an object and a row of the registry: two made-up ones go through every entrance."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from distributed import io_checks
from gemma4_moe import Gemma4MoEStateDictAdapter, convert, inspect, load_hf
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.converter import blocks
from gemma4_moe.errors import (
    DuplicateTensorError,
    Gemma4MoEError,
    IncompleteExpertsError,
    TensorShapeError,
    UsageError,
)
from gemma4_moe.layout import spellings
from gemma4_moe.refit import WeightStream
from support import forms, ranks
from support.checkpoints import config_of, write_checkpoint
from support.forms import FORMS
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict, read_directory
from support.streams import assert_same_stream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

E, H, I = 6, 10, 7  # noqa: E741
HF = random_hf_state_dict()
LAYER = "model.language_model.layers.1."
#: For each form: a tensor of expert 3 (or of all), and another name of what it holds.
PARTS = {"unfused": ("ffn.bank.up", "experts.gate_up_proj"), "single": ("moe.w3.three", "ffn.bank.gate")}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spellings, "SPELLINGS", spellings.SPELLINGS)
    forms.register()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def adapter(dtype: torch.dtype = torch.bfloat16, *, sizes: bool = True) -> Gemma4MoEStateDictAdapter:
    return Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I) if sizes else None, None, dtype)


def written(directory: Path, form: str, hf: dict[str, torch.Tensor] = HF) -> Path:
    """A checkpoint in a form."""
    return write_checkpoint(directory, FORMS[form](hf), config_of(hf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convert_leads_to_nemo_and_back(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = written(tmp_path / "hf", form)
    name = str(dtype).removeprefix("torch.")
    convert(source, tmp_path / "nemo", dtype=name, workers=1)
    nemo = {key: tensor.to(dtype) for key, tensor in nemo_from_hf(HF, dtype).items()}
    assert_same_tensors(read_directory(tmp_path / "nemo"), nemo)
    convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_tensors(read_directory(tmp_path / "back"), hf_from_nemo(nemo))


def test_blocks_of_any_size_give_the_same_bytes_and_facts(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = random_hf_state_dict(layers=1, E=12, H=480, I=416, dtype=torch.float32)
    path = "model.language_model.layers.0.experts."
    hf[path + "gate_up_proj"][::5, 400:900, 7] = 1e6  # beyond fp16, in gate's rows and in up's
    written(tmp_path / "form", form, hf)
    write_checkpoint(tmp_path / "fused", hf)
    expected = nemo_from_hf(hf, torch.float16)
    facts = []
    for size in (1, 5 * 2**20, 2**25):  # an expert each; some experts; all
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        for kind in ("form", "fused"):
            convert(tmp_path / kind, tmp_path / f"{kind}{size}", dtype="float16")
            found = read_directory(tmp_path / f"{kind}{size}")
            assert_same_tensors(found, {name: tensor.to(torch.float16) for name, tensor in expected.items()})
            facts.append(json.loads((tmp_path / f"{kind}{size}" / "gemma4_moe.json").read_text())["overflowed"])
    assert facts[0]
    assert facts == [facts[0]] * 6


def test_a_base_in_a_form_gives_its_own_bits_back(form: str, tmp_path: Path) -> None:
    base = written(tmp_path / "base", form)
    convert(base, tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), HF)


def test_inspect_names_the_form_and_finds_nothing_wrong(form: str, tmp_path: Path) -> None:
    found = inspect(written(tmp_path / "hf", form))
    assert (found.layout, found.spelling, found.problems) == ("hf", form, ())


def test_load_hf_fills_a_model(form: str, tmp_path: Path) -> None:
    expected = nemo_from_hf(HF, torch.float32)
    model = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    found = load_hf(model, written(tmp_path / "hf", form))
    assert_same_tensors(model, expected)
    assert found.read_bytes == sum(tensor.nbytes for tensor in HF.values())


def pairs(state: dict[str, Any], order: str) -> Iterator[tuple[str, Any]]:
    yield from sorted(state.items(), reverse=order == "backwards")


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_hf_takes_it_in_any_order_and_into_out(form: str, order: str, dtype: torch.dtype) -> None:
    expected = nemo_from_hf(HF, dtype)
    state = FORMS[form](HF)
    assert_same_tensors(adapter(dtype).from_hf(pairs(state, order)), expected)
    assert_same_tensors(adapter(dtype, sizes=False).from_hf(dict(pairs(state, order))), expected)
    out = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    found = adapter().from_hf(pairs(state, order), out=out)
    assert_same_tensors(out, expected)
    assert all(found[name] is out[name] for name in out)


def test_from_hf_reads_lazy_slices(form: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "hf", form)
    files = [safe_open(file, "pt") for file in sorted(directory.glob("*.safetensors"))]
    lazy = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
    assert_same_tensors(adapter().from_hf(lazy), nemo_from_hf(HF))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_their_own_part(form: str, world: int, tmp_path: Path) -> None:
    hf = random_hf_state_dict(E=io_checks.E, H=io_checks.H, I=io_checks.I, layers=2)
    ranks.run(world, io_checks.check_form, world, written(tmp_path / "hf", form, hf), form)


def test_a_stream_writes_it_and_it_can_be_read_again(form: str) -> None:
    nemo = nemo_from_hf(HF)
    stream: Any = WeightStream(adapter(), nemo, experts=form)
    sent = FORMS[form](hf_from_nemo(nemo))
    assert_same_stream(sorted(stream, key=lambda pair: pair[0]), sorted(sent.items()))
    in_buckets = [pair for bucket in stream.buckets() for pair in bucket.tensors()]
    assert_same_stream(in_buckets, [(planned.name, sent[planned.name]) for planned in stream.plan()])
    assert_same_tensors(adapter().from_hf(sent), nemo)


def entrances(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    source = write_checkpoint(tmp_path / "bad", state, config_of(HF))
    nemo = {name: torch.zeros_like(tensor) for name, tensor in nemo_from_hf(HF).items()}
    return {
        "convert": lambda: convert(source, tmp_path / "nemo"),
        "load_hf": lambda: load_hf(nemo, source),
        "from_hf": lambda: adapter().from_hf(state),
    }


def refused(state: dict[str, Any], error: type[Gemma4MoEError], words: str, tmp_path: Path) -> list[Gemma4MoEError]:
    found = []
    for name, attempt in entrances(state, tmp_path).items():
        with pytest.raises(error, match=words) as caught:
            attempt()
        assert caught.value.hint, name
        found.append(caught.value)
    problems = inspect(tmp_path / "bad").problems
    assert {type(problem) for problem in problems} == {error}
    return [*found, *problems]


def test_a_part_that_is_missing_is_named(form: str, tmp_path: Path) -> None:
    state = FORMS[form](HF)
    name = LAYER + PARTS[form][0]
    del state[name]
    for error in refused(state, IncompleteExpertsError, "for layer 1: part of gate_up missing", tmp_path):
        assert error.facts["tensor"] == name


def test_a_part_that_is_there_twice_is_named(form: str, tmp_path: Path) -> None:
    state = FORMS[form](HF)
    other = LAYER + PARTS[form][1]
    state[other] = torch.zeros(E, 2 * I if "gate_up" in other else I, H, dtype=torch.bfloat16)
    refused(state, DuplicateTensorError, "two spellings", tmp_path)


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    state = FORMS["single"](HF)
    state[f"{LAYER}moe.w{E}.one"] = torch.zeros(I, H, dtype=torch.bfloat16)
    for error in refused(state, TensorShapeError, "an expert that the model does not have", tmp_path):
        assert error.facts["tensor"] == f"{LAYER}moe.w{E}.one"


def test_tensors_of_a_role_have_one_dtype(form: str, tmp_path: Path) -> None:
    state = FORMS[form](HF)
    name = LAYER + PARTS[form][0]
    state[name] = state[name].float()
    refused(state, TensorShapeError, "tensors of one role with different dtypes", tmp_path)


def test_experts_that_come_before_their_number_is_known_are_refused() -> None:
    state = FORMS["single"](HF)
    with pytest.raises(UsageError, match="number of experts is not known"):
        adapter(sizes=False).from_hf((name, state[name]) for name in sorted(state, key=lambda name: "one" not in name))


def test_a_dtensor_among_them_is_refused(form: str) -> None:
    ranks.run(1, io_checks.check_form_of_dtensors, form)
