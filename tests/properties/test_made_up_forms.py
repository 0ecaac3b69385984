"""A form of the hf layout is an object and a row of the registry: two made-up ones go through every entrance."""

import json

import pytest
import torch
from safetensors import safe_open

from distributed import io_checks
from gemma4_moe import Gemma4MoEStateDictAdapter, convert, inspect, load_hf
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.converter import blocks
from gemma4_moe.errors import (
    DuplicateTensorError,
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

E, H, I = 6, 10, 7  # noqa: E741
HF = random_hf_state_dict()
LAYER = "model.language_model.layers.1."
#: For each form: a tensor of expert 3 (or of all), and another name of what it holds.
PARTS = {"banks": ("ffn.bank.up", "experts.gate_up_proj"), "single": ("moe.w3.three", "ffn.bank.gate")}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(spellings, "SPELLINGS", spellings.SPELLINGS)
    forms.register()


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def adapter(dtype=torch.bfloat16, *, sizes=True):
    return Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I) if sizes else None, None, dtype)


def written(directory, form, hf=HF):
    """A checkpoint in a form."""
    return write_checkpoint(directory, FORMS[form](hf), config_of(hf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convert_leads_to_nemo_and_back(form, dtype, tmp_path):
    source = written(tmp_path / "hf", form)
    name = str(dtype).removeprefix("torch.")
    convert(source, tmp_path / "nemo", dtype=name, workers=1)
    nemo = {key: tensor.to(dtype) for key, tensor in nemo_from_hf(HF, dtype).items()}
    assert_same_tensors(read_directory(tmp_path / "nemo"), nemo)
    convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_tensors(read_directory(tmp_path / "back"), hf_from_nemo(nemo))


def test_blocks_of_any_size_give_the_same_bytes_and_facts(form, tmp_path, monkeypatch):
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


def test_a_base_in_a_form_gives_its_own_bits_back(form, tmp_path):
    base = written(tmp_path / "base", form)
    convert(base, tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), HF)


def test_inspect_names_the_form_and_finds_nothing_wrong(form, tmp_path):
    found = inspect(written(tmp_path / "hf", form))
    assert (found.layout, found.spelling, found.problems) == ("hf", form, ())


def test_load_hf_fills_a_model(form, tmp_path):
    expected = nemo_from_hf(HF, torch.float32)
    model = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    found = load_hf(model, written(tmp_path / "hf", form))
    assert_same_tensors(model, expected)
    assert found.read_bytes == sum(tensor.nbytes for tensor in HF.values())


def pairs(state, order):
    yield from sorted(state.items(), reverse=order == "backwards")


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_hf_takes_it_in_any_order_and_into_out(form, order, dtype):
    expected = nemo_from_hf(HF, dtype)
    state = FORMS[form](HF)
    assert_same_tensors(adapter(dtype).from_hf(pairs(state, order)), expected)
    assert_same_tensors(adapter(dtype, sizes=False).from_hf(dict(pairs(state, order))), expected)
    out = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    found = adapter().from_hf(pairs(state, order), out=out)
    assert_same_tensors(out, expected)
    assert all(found[name] is out[name] for name in out)


def test_from_hf_reads_lazy_slices(form, tmp_path):
    directory = written(tmp_path / "hf", form)
    files = [safe_open(file, "pt") for file in sorted(directory.glob("*.safetensors"))]
    lazy = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
    assert_same_tensors(adapter().from_hf(lazy), nemo_from_hf(HF))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_their_own_part(form, world, tmp_path):
    hf = random_hf_state_dict(E=io_checks.E, H=io_checks.H, I=io_checks.I, layers=2)
    ranks.run(world, io_checks.check_form, world, written(tmp_path / "hf", form, hf), form)


def test_a_stream_writes_it_and_it_can_be_read_again(form):
    nemo = nemo_from_hf(HF)
    stream = WeightStream(nemo, adapter(), experts=form)
    sent = FORMS[form](hf_from_nemo(nemo))
    assert_same_stream(sorted(stream, key=lambda pair: pair[0]), sorted(sent.items()))
    in_buckets = [pair for bucket in stream.buckets() for pair in bucket.tensors()]
    assert_same_stream(in_buckets, [(planned.name, sent[planned.name]) for planned in stream.plan()])
    assert_same_tensors(adapter().from_hf(sent), nemo)


def refused(state, error, words, tmp_path):
    """Return the error of each entrance, which must be of this type and have these words."""
    source = write_checkpoint(tmp_path / "bad", state, config_of(HF))
    nemo = {name: torch.zeros_like(tensor) for name, tensor in nemo_from_hf(HF).items()}
    found = []
    for attempt in (
        lambda: convert(source, tmp_path / "nemo"),
        lambda: load_hf(nemo, source),
        lambda: adapter().from_hf(state),
    ):
        with pytest.raises(error, match=words) as caught:
            attempt()
        assert caught.value.hint
        found.append(caught.value)
    problems = inspect(source).problems
    assert {type(problem) for problem in problems} == {error}
    return [*found, *problems]


def test_a_part_that_is_missing_or_there_twice_or_of_another_dtype_is_named(form, tmp_path):
    state = FORMS[form](HF)
    name, other = (LAYER + part for part in PARTS[form])
    twice = torch.zeros(E, 2 * I if "gate_up" in other else I, H, dtype=torch.bfloat16)
    without = {key: tensor for key, tensor in state.items() if key != name}
    for number, (changed, error, words) in enumerate(
        (
            (without, IncompleteExpertsError, "for layer 1: part of gate_up missing"),
            (state | {other: twice}, DuplicateTensorError, "two spellings"),
            (state | {name: state[name].float()}, TensorShapeError, "tensors of one role with different dtypes"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        found = refused(changed, error, words, tmp_path / str(number))
        assert number or {problem.facts["tensor"] for problem in found} == {name}


def test_an_expert_too_many_is_named(tmp_path):
    name = f"{LAYER}moe.w{E}.one"
    state = FORMS["single"](HF) | {name: torch.zeros(I, H, dtype=torch.bfloat16)}
    found = refused(state, TensorShapeError, "an expert that the model does not have", tmp_path)
    assert {error.facts["tensor"] for error in found} == {name}


def test_experts_that_come_before_their_number_is_known_are_refused():
    state = FORMS["single"](HF)
    with pytest.raises(UsageError, match="number of experts is not known"):
        adapter(sizes=False).from_hf((name, state[name]) for name in sorted(state, key=lambda name: "one" not in name))


def test_a_dtensor_among_them_is_refused(form):
    ranks.run(1, io_checks.check_form_of_dtensors, form)
