"""`verify` and `diff` of models on the Hub, a server of our own: fetched into its cache, or read there."""

import json

import pytest

from gemma4_moe import convert, diff
from gemma4_moe.verifier.pieces import _PIECE
from support.checkpoints import flip_bit, write_checkpoint
from support.hub_server import COMMIT, FILE_PATH, serving, serving_too, start
from support.models import random_hf_state_dict

MODEL, OTHER = "google/small-gemma", "lab/trained-gemma"
DOWN = "model.language_model.layers.1.experts.down_proj"


@pytest.fixture
def hub(source):
    with serving(MODEL, source) as hub:
        yield hub


@pytest.fixture
def trained(hub, tmp_path):
    """Another model on the same Hub, in which one tensor differs."""
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24)
    state[DOWN][2, 3, 4] += 0.5
    with serving_too(hub, OTHER, write_checkpoint(tmp_path / "trained", state, files=3)) as other:
        yield other


def ask(*arguments, status=0):
    return json.loads(start(*arguments, "--format", "json", status=status).stdout)


def names(home):
    return sorted(path.name for path in home.iterdir())


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_both_sides_of_a_diff_may_be_on_the_hub(options, hub, trained, tmp_path):
    before = names(tmp_path)
    found = ask(hub, tmp_path, "diff", MODEL, OTHER, *options, status=4)
    (difference,) = found["differences"]
    assert (difference["name"], difference["count"], difference["index"]) == (DOWN, 1, [2, 3, 4])
    assert (found["tensors"], found["equal"]) == (17, 16)
    for each in (hub, trained):
        assert each.weight_requests, "it was read on the Hub"
        assert (None in each.weight_requests) == (not options), "None is a whole file"
    assert [name for name in names(tmp_path) if name not in (*before, "home")] == ([] if options else ["cache"])


@pytest.mark.parametrize("options", [[], ["--stream"]])
@pytest.mark.parametrize("models", [(MODEL, "trained"), ("hf", OTHER), (OTHER, "hf"), (MODEL, MODEL)])
def test_a_directory_and_a_model_on_the_hub(options, models, hub, trained, tmp_path):
    alike = models == (MODEL, MODEL)
    assert ask(hub, tmp_path, "diff", *models, *options, status=0 if alike else 4)["different"] == (not alike)


def test_a_target_is_verified_against_a_source_that_is_read_in_place(hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    before = names(tmp_path)
    found = ask(hub, tmp_path, "verify", "--stream", MODEL, "nemo", "--revision", "main")
    assert (found["tensors"], found["equal"]) == (15, 15)
    assert found["files"] == {"compared": 2, "equal": 2, "different": 0}
    assert set(names(tmp_path)) - {"home"} == set(before), "nothing is kept"
    assert None not in hub.weight_requests
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total <= hub.weight_bytes < total + 2 * 2**16, "each byte once, and the headers"


def test_what_differs_is_found_in_place_too(hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    flip_bit(tmp_path / "nemo/nemo.safetensors", -1)
    (tmp_path / "nemo/tokenizer.json").write_text("{}")
    fetched = ask(hub, tmp_path, "verify", MODEL, "nemo", status=4)
    assert ask(hub, tmp_path, "verify", "--stream", MODEL, "nemo", status=4) == fetched
    assert (fetched["different"], fetched["files"]["different"]) == (1, 1)
    assert fetched["differences"][0]["distance"]["max_absolute"] > 0


def test_a_long_tensor_is_read_in_few_requests(tmp_path):
    state = random_hf_state_dict(layers=1)
    name = "model.language_model.embed_tokens.weight"
    state[name] = state[name].repeat(9000, 1)
    source = write_checkpoint(tmp_path / "hf", state, files=1)
    assert state[name].nbytes > 10 * 2 * _PIECE, "many pieces that are compared at once"
    with serving(MODEL, source) as hub:
        ask(hub, tmp_path, "diff", "--stream", MODEL, source)
        assert len(hub.weight_requests) <= len(state) + 2, "the header, each tensor, and the scale once more"


def test_lost_scales_are_read_in_place(hub, source, tmp_path):
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24)
    lost = {name: tensor for name, tensor in state.items() if not name.endswith("per_expert_scale")}
    write_checkpoint(tmp_path / "lost", lost, json.loads((source / "config.json").read_text()))
    convert(tmp_path / "lost", tmp_path / "nemo", scale_from=source)
    assert ask(hub, tmp_path, "verify", "--stream", "lost", "nemo", "--scale-from", MODEL)["different"] == 0
    assert None not in hub.weight_requests


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("verify --stream hf nemo", 2, ["only a model on the Hub can be streamed", "leave --stream out"]),
        ("diff --stream hf hf", 2, ["only a model on the Hub can be streamed", "leave --stream out"]),
        ("verify --stream nemo", 2, ["a target alone is only hashed", "name SRC and DST, or leave --stream out"]),
        ("verify nemo --scale ones --strip-wrappers", 2, ["leave --strip-wrappers, --scale out"]),
        (f"diff --stream {MODEL} nemo", 3, ["different layouts", f"gemma4-moe verify --stream {MODEL} nemo"]),
        (f"diff {MODEL} nemo", 3, ["different layouts", f"gemma4-moe verify {MODEL} nemo"]),
        ("diff google/unknown hf", 3, ["no such model on the Hub"]),
        ("verify --stream google/unknown nemo", 3, ["no such model on the Hub"]),
        (f"verify --stream {MODEL} nemo --revision nowhere", 3, ["no such revision"]),
    ],
)
def test_what_can_not_be_compared_is_told(arguments, status, words, hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    done = start(hub, tmp_path, *arguments.split(), status=status)
    assert all(word in done.stderr for word in words), done.stderr


def test_the_command_after_different_layouts_works(hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    said = start(hub, tmp_path, "diff", "--stream", MODEL, "nemo", status=3).stderr
    command = said.partition("next: gemma4-moe ")[2].split()
    start(hub, tmp_path, *command)


def test_a_result_names_the_model_and_its_commit(hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + FILE_PATH)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = diff(source, MODEL, stream=True)
    assert (found.source, str(found.target)) == (source, f"{MODEL}@{COMMIT[:12]}")
    assert found.different == ()
