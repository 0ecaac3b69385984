"""Names that don't fit config.json are named by every command, and the command of the hint mends them."""

import json
import shlex
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from gemma4_moe import convert, inspect, plan, verify
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.errors import InputError, UnknownTensorError
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import read_directory

TEXT, WHOLE = "model.", "model.language_model."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("multimodal", "text"):
        save_model(build_model(kind, seed=3), root / kind)
    return root


def written(directory, tensors, config_of):
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((config_of / "config.json").read_bytes())
    return directory


def whole_as(models, tmp_path, distort, kind):
    """The saved model of one kind with distorted names."""
    state = read_directory(models / kind)
    return state, written(tmp_path / "source", {distort(name): t for name, t in state.items()}, models / kind)


DOUBLED = {
    "doubled at the start": lambda name: f"model.{name}",
    "PEFT's": lambda name: f"base_model.model.{name}",
    "doubled inside": lambda name: name.replace("layers.1.", "layers.1.model.layers.1."),
    "without model.": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("fault", DOUBLED)
def test_other_prefixes_are_named_and_mended_on_the_way(fault, kind, models, tmp_path):
    state, source = whole_as(models, tmp_path, DOUBLED[fault], kind)
    (problem,) = inspect(source).problems
    assert "another prefix" in problem.problem
    assert problem.facts["expected"].split(",")[0] in state
    for call in (lambda: convert(source, tmp_path / "out"), lambda: plan(source), lambda: verify(source, source)):
        with pytest.raises(UnknownTensorError, match="another prefix"):
            call()
    words = shlex.split(problem.hint.partition(": ")[2])
    assert words == ["gemma4-moe", "convert", str(source), "DST", "--strip-wrappers"]
    convert(source, tmp_path / "out", strip_wrappers=True)
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))
    assert not verify(source, tmp_path / "out", strip_wrappers=True).different


def test_text_only_names_under_a_multimodal_config(models, tmp_path):
    state = read_directory(models / "text")
    source = written(tmp_path / "a source", state, models / "multimodal")
    (problem,) = inspect(source).problems
    assert problem.problem == "text-only names under a multimodal config.json"
    with pytest.raises(UnknownTensorError, match="text-only names"):
        convert(source, tmp_path / "out")
    subprocess.run(problem.hint.rpartition("model's: ")[2], shell=True, check=True)
    assert inspect(source).problems == ()
    assert json.loads((source / "config.json").read_text())["model_type"] == "gemma4_text"
    convert(source, tmp_path / "out")
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))


def test_a_whole_multimodal_model_under_a_text_config(models, tmp_path):
    state = read_directory(models / "multimodal")
    source = written(tmp_path / "source", state, models / "text")
    (problem,) = inspect(source).problems
    assert problem.problem == "names of a multimodal model under a text-only config.json"
    with pytest.raises(UnknownTensorError, match="names of a multimodal model"):
        convert(source, tmp_path / "out")
    command = problem.hint.rpartition("place: ")[2].replace("BASE", str(models / "multimodal"))
    subprocess.run(shlex.split(command), check=True)
    convert(source, tmp_path / "out")
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))


def test_multimodal_text_names_without_a_vision_tower_under_a_text_config(models, tmp_path):
    state = read_directory(models / "text")
    source = written(tmp_path / "source", {n.replace(TEXT, WHOLE, 1): t for n, t in state.items()}, models / "text")
    (problem,) = inspect(source).problems
    assert problem.problem == "names of a multimodal model under a text-only config.json"
    assert "--strip-wrappers" in problem.hint
    convert(source, tmp_path / "out", strip_wrappers=True)
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))


def test_names_in_two_prefixes_and_a_vision_tower_of_a_text_model_are_problems(models, tmp_path):
    state = read_directory(models / "text")
    mixed = {name.replace(TEXT, WHOLE, 1) if "layers.1." in name else name: t for name, t in state.items()}
    source = written(tmp_path / "mixed", mixed, models / "text")
    with pytest.raises(UnknownTensorError, match="another prefix"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", strip_wrappers=True)
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state))
    tower = state | {"model.vision_tower.std_scale": torch.full((3,), 2.0)}
    source = written(tmp_path / "tower", tower, models / "text")
    with pytest.raises(UnknownTensorError, match="a multimodal model's tensors under a text-only"):
        convert(source, tmp_path / "towers")


MISSING = ["layer_scalar", "self_attn.", "layers.1.pre_feedforward_layernorm_2", "embed_tokens", "mlp.up_proj"]


@pytest.mark.parametrize("layout", ["hf", "nemo"])
@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("part", MISSING)
def test_a_tensor_that_the_config_calls_for_is_missed(part, kind, layout, models, tmp_path):
    state = read_directory(models / kind)
    state = state if layout == "hf" else nemo_from_hf(state)
    lacked = [name for name in state if part in name and "tower" not in name]
    assert lacked
    source = written(tmp_path / "source", {n: t for n, t in state.items() if n not in lacked}, models / kind)
    (problem,) = inspect(source).problems
    assert "are missing" in problem.problem
    assert problem.facts["tensor"] in lacked
    assert f"without {len(lacked)}: " in problem.facts["found"]
    for call in (lambda: convert(source, tmp_path / "out"), lambda: plan(source), lambda: verify(source, source)):
        with pytest.raises(InputError, match=r"(?s)are missing.*" + part.rstrip(".").rpartition(".")[2]):
            call()
    assert not (tmp_path / "out").exists()


def test_another_shape_than_the_configs_is_a_problem(models, tmp_path):
    state = read_directory(models / "text")
    name = "model.layers.1.self_attn.o_proj.weight"
    source = written(tmp_path / "source", state | {name: state[name][:-1].clone()}, models / "text")
    (problem,) = inspect(source).problems
    assert problem.facts["tensor"] == name
    with pytest.raises(InputError, match="another shape"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_a_whole_model_gives_no_note_and_a_tensor_too_many_one(kind, models, tmp_path):
    state = read_directory(models / kind)
    head = {"lm_head.weight": next(t for name, t in state.items() if "embed_tokens" in name).clone()}
    tied = written(tmp_path / "tied", state | head, models / kind)
    for source in (models / kind, tied):
        found = inspect(source)
        assert (found.problems, found.notes) == ((), ())
        assert plan(source).notes == ()
    more = {f"value_head.{number}.weight": torch.full((2,), 3.0) for number in range(3)}
    source = written(tmp_path / "more", state | more, models / kind)
    (note,) = convert(source, tmp_path / "out").notes
    assert note.startswith("3 tensors value_head.{0...2}.weight: config.json does not call for them")
    assert inspect(source).notes == plan(source).notes == (note,)
    assert_same_tensors(read_directory(tmp_path / "out"), nemo_from_hf(state | more))


def test_a_config_that_does_not_say_which_tensors_there_are_is_said(models, tmp_path):
    state = read_directory(models / "text")
    source = written(tmp_path / "source", state, models / "text")
    document = json.loads((source / "config.json").read_text())
    for field, value in {"layer_types": 3, "head_dim": None, "per_layer_config": [1], "vocab_size": "many"}.items():
        (source / "config.json").write_text(json.dumps(document | {field: value}))
        found = inspect(source)
        assert found.problems == ()
        assert f"a sensible {field}" in found.notes[0]
    (source / "config.json").write_text(json.dumps(document | {"vision_config": []}))
    assert inspect(source).problems == ()
