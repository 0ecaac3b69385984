"""Checkpoints that must not be converted: each is refused in words, with its exit status, and nothing is written."""

import json
import os

import pytest
import torch

from gemma4_moe.cli import commands
from support.checkpoints import config_of, contents, write_checkpoint
from support.models import random_hf_state_dict

P = "model.language_model.layers.1."
State = dict[str, torch.Tensor]


@pytest.fixture
def require_refusal(tmp_path, capsys):
    def require(source, target, words, status=3):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as caught:
            commands.main(["convert", str(source), str(target)])
        talk = capsys.readouterr().err
        assert caught.value.code == status, talk
        for word in words:
            assert word in talk
        assert contents(tmp_path) == before, "nothing is changed, nothing is left"

    return require


def without(rest):
    return lambda state: state.pop(P + rest)


def added(rest, *shape, prefix=P):
    return lambda state: state.update({prefix + rest: torch.zeros(shape, dtype=torch.bfloat16)})


def transposed(rest):
    return lambda state: state.update({P + rest: state[P + rest].transpose(-1, -2).contiguous()})


def fewer_experts(state):
    for name, tensor in state.items():
        if name.endswith(("gate_up_proj", "experts.down_proj", "per_expert_scale", "router.proj.weight")):
            state[name] = tensor[:4].clone()


def one_with_fewer_experts(state):
    state[P + "experts.down_proj"] = state[P + "experts.down_proj"][:5].clone()


def as_float8(state):
    for name in (P + "experts.gate_up_proj", P + "experts.down_proj"):
        state[name] = state[name].to(torch.float8_e4m3fn)


def per_expert(state):
    fused = state.pop(P + "experts.gate_up_proj")
    for expert, rows in enumerate(fused):
        state[f"{P}experts.{expert}.gate_proj.weight"] = rows[:7].clone()
        state[f"{P}experts.{expert}.up_proj.weight"] = rows[7:].clone()
    del state[f"{P}experts.4.up_proj.weight"]


def text(**changes):
    return lambda config: config["text_config"].update(changes)


IN_A_LAYER = "<prefix>layers.<number>.experts.down_proj"
#: Each damage, and the words that its refusal must have.
STATES = {
    "gate_up missing": (without("experts.gate_up_proj"), P + "experts.gate_up_proj", "Incomplete"),
    "down missing": (without("experts.down_proj"), P + "experts.down_proj", "Incomplete"),
    "scale missing": (without("router.per_expert_scale"), P + "router.per_expert_scale", "Incomplete"),
    "router missing": (without("router.proj.weight"), P + "router.proj.weight", "Incomplete"),
    "router scale missing": (without("router.scale"), P + "router.scale", "Incomplete"),
    "E is not the config's": (fewer_experts, "E = 6 from the config", "[4, "),
    "one E differs": (one_with_fewer_experts, P + "experts.down_proj", "[6, 10, 7]", "[5, 10, 7]"),
    "down transposed": (transposed("experts.down_proj"), P + "experts.down_proj", "[6, 10, 7]", "[6, 7, 10]"),
    "gate_up transposed": (transposed("experts.gate_up_proj"), "[6, 14, 10]", "[6, 10, 14]"),
    "router transposed": (transposed("router.proj.weight"), P + "router.proj.weight", "[6, 10]", "[10, 6]"),
    "both spellings": (added("moe.down_proj", 6, 10, 7), "two spellings", P + "moe.down_proj"),
    "a bias of the experts": (added("experts.down_proj_bias", 6, 10), P + "experts.down_proj_bias"),
    "an unknown router tensor": (added("router.bias", 6), P + "router.bias", "router.per_expert_scale"),
    "an unknown moe tensor": (added("moe.gate.bias", 6), P + "moe.gate.bias"),
    "nemo names among hf names": (added("moe.gate.scale", 10), "both layouts"),
    "experts outside a layer": (added("experts.down_proj", 6, 10, 7, prefix=""), "outside a layer", IN_A_LAYER),
    "float8 experts": (as_float8, P + "experts.", "does not say which library"),
    "an expert missing": (per_expert, "part of gate_up missing", f"{P}experts.4.up_proj.weight"),
    "FP8": (added("experts.0.down_proj.weight_scale", 10), "weight_scale", "a scale of no quantised weight"),
    "NVFP4": (added("mlp.down_proj.weight_packed", 10), "weight_packed", "does not say which library"),
    "ModelOpt": (added("experts.0.down_proj.weight_scale_2", 1), "weight_scale_2", "a scale of no quantised weight"),
    "MLX quantised": (added("experts.switch_glu.down_proj.scales", 6, 10, 7), "MLX quantised"),
    "MLX beside it": (added("experts.switch_glu.down_proj.weight", 6, 10, 7), "two spellings"),
    "LoRA": (added("self_attn.q_proj.lora_A.weight", 3, 10), "LoRA"),
    "NeMo's LoRA of experts": (added("moe.experts.lora_down_A", 6, 7, 3), "LoRA"),
}

CONFIGS = {
    "quantization_config": (lambda config: config.update(quantization_config={"quant_method": "fp8"}), "quantised"),
    "unified": (lambda config: config.update(model_type="gemma4_unified"), "dense"),
    "drafter": (lambda config: config.update(model_type="gemma4_assistant"), "drafter"),
    "another model": (lambda config: config.update(model_type="qwen3_moe"), "qwen3_moe", "gemma4"),
    "no text_config": (lambda config: config.update(text_config=[]), "text_config"),
    "a layer that the config counts is missing": (text(num_hidden_layers=3), "layers.2.", "3 layers"),
    "a layer that the config does not count": (text(num_hidden_layers=1), "layers.1.", "layers 0 to 0"),
    "E of 10^9": (text(num_experts=10**9), "num_experts"),
    "E negative": (text(num_experts=-6), "num_experts", "-6"),
    "E a string": (text(num_experts="6"), "num_experts", "'6'"),
    "E null": (text(num_experts=None), "num_experts", "None"),
}


@pytest.mark.parametrize("name", [*STATES, *CONFIGS])
def test_a_bad_state_dict_or_config_is_refused(name, tmp_path, require_refusal):
    state = random_hf_state_dict()
    config = config_of(state)
    damage, *words = (STATES | CONFIGS)[name]
    damage(state if name in STATES else config)
    require_refusal(write_checkpoint(tmp_path / "hf", state, config), tmp_path / "nemo", (*words, "next:"))


FIRST, STALE = "model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def written(name, content):
    return lambda source: (source / name).write_bytes(content)


def removed(name):
    return lambda source: (source / name).unlink()


def indexed(change):
    def damage(source):
        index = json.loads((source / INDEX).read_text())
        change(index["weight_map"])
        (source / INDEX).write_text(json.dumps(index))

    return damage


def pickles_alone(source):
    for path in source.glob("*.safetensors*"):
        path.rename(source / "pytorch_model.bin")


def empty(source):
    for path in source.iterdir():
        path.unlink()


DAMAGES = {
    "config missing": (removed("config.json"), "config.json"),
    "config senseless": (written("config.json", b"{model_type: gemma4}"), "config.json", "JSON"),
    "config a list": (written("config.json", b"[]"), "config.json", "object"),
    "config oversized": (written("config.json", b'{"a": "' + b"x" * (11 * 2**20) + b'"}'), "config.json", "10485760"),
    "file truncated": (lambda s: os.truncate(s / FIRST, (s / FIRST).stat().st_size - 1), FIRST, "bytes"),
    "file missing": (removed(FIRST), FIRST),
    "index naming a parent": (indexed(lambda places: places.update(a="../x.safetensors")), "index", "../x.safetensors"),
    "index naming a tensor that is not there": (indexed(lambda places: places.update(a=FIRST)), "index", "a"),
    "index lacking a tensor": (indexed(lambda places: places.pop(P + "router.scale")), P + "router.scale"),
    "stale file": (lambda s: (s / STALE).write_bytes((s / FIRST).read_bytes()), STALE),
    "pickles only": (pickles_alone, "pickle"),
    "empty directory": (empty, "no safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused(name, tmp_path, require_refusal):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    damage, *words = DAMAGES[name]
    damage(source)
    require_refusal(source, tmp_path / "nemo", (*words, "next:"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (".", "is the source"),
        ("inside", "lies inside the source"),
        ("../alias/nemo", "lies inside the source"),
        ("..", "holds the source"),
        ("../missing/nemo", "does not exist"),
        ("../taken", "the target exists"),
        ("../link", "a link"),
        ("../file", "a file"),
    ],
)
def test_a_target_that_may_not_be_written_is_2(target, words, tmp_path, require_refusal):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "file").write_text("mine")
    require_refusal(source, source / target, (words,), 2)
