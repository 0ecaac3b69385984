"""Damage that many tensors share is one error, whose command leads to a checkpoint that is converted."""

import json
import shlex
import subprocess

import pytest
import torch

from gemma4_moe import convert, inspect, plan, verify
from gemma4_moe.errors import (
    ConfigError,
    IncompleteExpertsError,
    TensorShapeError,
    UnsupportedCheckpointError,
    UsageError,
)
from support.checkpoints import config_of, write_checkpoint
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory

SCALE = "router.per_expert_scale"


def without_scales(state):
    return {name: tensor for name, tensor in state.items() if SCALE not in name}


def only_problem(source, target, error):
    (problem,) = inspect(source).problems
    with pytest.raises(error) as caught:
        convert(source, target)
    assert str(caught.value) == str(problem)
    return problem


def test_parameters_emptied_by_zero_3(hf, tmp_path):
    empty = {name: torch.empty(0) if "experts" in name else tensor for name, tensor in hf.items()}
    source = write_checkpoint(tmp_path / "hf", empty, config_of(hf))
    problem = only_problem(source, tmp_path / "out", TensorShapeError)
    assert "ZeRO-3" in problem.problem
    assert problem.facts["found"] == f"[0], in 4 of {len(hf)} tensors"
    assert "zero_to_fp32.py" in problem.hint


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("layout", ["hf", "nemo"])
def test_pruned_experts_and_a_stale_config(layout, text_only, tmp_path):
    prefix = "model." if text_only else "model.language_model."
    state, stale = (random_hf_state_dict(E=count, prefix=prefix) for count in (4, 6))
    stored = state if layout == "hf" else nemo_from_hf(state)
    config = config_of(stale, top_k_experts=5)
    source = write_checkpoint(tmp_path / "a model", stored, config["text_config"] if text_only else config)
    problem = only_problem(source, tmp_path / "out", ConfigError)
    assert problem.facts["expected"] == "E = 6 from the config"
    assert problem.facts["found"].startswith(f"E = 4 in all {8 if layout == 'hf' else 6} tensors")
    subprocess.run(shlex.split(problem.hint.partition("into it: ")[2]), check=True)
    document = json.loads((source / "config.json").read_text())
    text = document.get("text_config", document)
    assert (text["num_experts"], text["top_k_experts"], text["hidden_size"]) == (4, 4, 10)
    convert(source, tmp_path / "out")
    if layout == "hf":
        assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))


@pytest.mark.parametrize("legacy", [False, True])
def test_lost_scales_are_ones_or_the_bases(legacy, hf, tmp_path):
    lost = without_scales(hf)
    source = write_checkpoint(tmp_path / "lost", lost, config_of(hf))
    spelled = {name.replace(SCALE, "moe.per_expert_scale") if legacy else name: t for name, t in hf.items()}
    base = write_checkpoint(tmp_path / "base", spelled, config_of(hf))
    problem = only_problem(source, tmp_path / "out", IncompleteExpertsError)
    commands = [shlex.split(part) for part in problem.hint.replace("; if", ": ").split(": ") if "gemma4-moe" in part]
    assert [words[4:] for words in commands] == [["--scale", "ones"], ["--scale-from", "BASE"]]
    ones = {n: torch.ones_like(t) for n, t in hf.items() if SCALE in n}
    for given, expected in (({"scale": "ones"}, lost | ones), ({"scale_from": base}, hf)):
        target = tmp_path / next(iter(given))
        assert plan(source, **given).plan.tensors.keys() == nemo_from_hf(hf).keys()
        convert(source, target, **given)
        assert_same_tensors(read_directory(target), nemo_from_hf(expected))
        assert not verify(source, target, **given).different
        assert not verify(target).wrong
        convert(source, target, **given, resume=True)
    assert verify(source, tmp_path / "scale", scale_from=base).different
    with pytest.raises(UsageError):
        convert(source, tmp_path / "scale", scale_from=base, resume=True)


def test_ways_to_give_scales_that_have_no_meaning(hf, tmp_path):
    lost = write_checkpoint(tmp_path / "lost", without_scales(hf), config_of(hf))
    whole = write_checkpoint(tmp_path / "whole", hf)
    other = write_checkpoint(tmp_path / "other", random_hf_state_dict(E=5))
    for source, given, error, words in (
        (lost, {"scale": "twos"}, UsageError, "no way to give"),
        (lost, {"scale": "ones", "scale_from": whole}, UsageError, "no way to give"),
        (whole, {"scale": "ones"}, UsageError, "of its own"),
        (lost, {"scale_from": lost}, UsageError, "lacks one"),
        (lost, {"scale_from": other}, TensorShapeError, "another number of experts"),
    ):
        with pytest.raises(error, match=words):
            convert(source, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_experts": None, "moe_intermediate_size": None}, {"enable_moe_block": False}])
def test_a_dense_model_needs_no_conversion(changes, hf, tmp_path):
    dense = {name: t for name, t in hf.items() if "experts" not in name and "router" not in name}
    source = write_checkpoint(tmp_path / "dense", dense, config_of(hf, **changes))
    assert inspect(source).spelling == "dense"
    only_problem(source, tmp_path / "out", UnsupportedCheckpointError)
    for call in (plan, lambda path: convert(path, tmp_path / "out"), lambda path: verify(path, path)):
        with pytest.raises(UnsupportedCheckpointError, match="a dense model needs no conversion") as caught:
            call(source)
        assert caught.value.hint == "use it as it is"
    mixed = write_checkpoint(tmp_path / "mixed", hf, config_of(hf, **changes))
    assert "no experts, and its weights have some" in only_problem(mixed, tmp_path / "out", ConfigError).problem


@pytest.mark.parametrize(
    ("method", "form"),
    [("bitsandbytes", "bitsandbytes"), ("gptq", "GPTQ"), ("awq", "AWQ"), ("mxfp4", "MXFP4")],
)
def test_a_quantised_config_is_named(method, form, hf, tmp_path):
    config = config_of(hf) | {"quantization_config": {"quant_method": method}}
    problem = only_problem(write_checkpoint(tmp_path / "hf", hf, config), tmp_path / "out", UnsupportedCheckpointError)
    assert problem.form == form
    assert f"quantised: {form}" in problem.problem


def test_a_source_in_the_wanted_layout_is_used_as_it_is(hf, tmp_path):
    with pytest.raises(UsageError, match="in the hf layout already") as caught:
        convert(write_checkpoint(tmp_path / "hf", hf), tmp_path / "out", to="hf")
    assert caught.value.hint.startswith("it is hf already: use it as it is")


def test_a_mistyped_path_is_no_directory_and_the_network_is_in_the_hint_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (inspect, plan, lambda path: convert(path, "out"), lambda path: verify(path, path), verify):
        with pytest.raises(Exception, match=r"^no such directory") as caught:
            call("models/gema-4")
        assert caught.value.problem == "no such directory"
        assert "HF_HUB_OFFLINE" in caught.value.hint or "Hub can't be reached" in caught.value.hint
