"""Checkpoints that must not be converted: each is refused in words, with its exit status, and nothing is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma4_moe.cli import commands
from support.checkpoints import config_of, contents, write_checkpoint
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = "model.language_model.layers.1."
State = dict[str, torch.Tensor]


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        commands.main(["convert", *map(str, arguments)])
    return int(caught.value.code or 0), capsys.readouterr().err


@dataclass
class Bad:
    """A change to a good state dict, and the words that the refusal must have."""

    name: str
    change: Callable[[State], Any]
    words: tuple[str, ...]
    config: Callable[[State], dict[str, Any]] = config_of

    def __str__(self) -> str:
        return self.name


def without(rest: str) -> Callable[[State], Any]:
    return lambda state: state.pop(P + rest)


def added(rest: str, *shape: int) -> Callable[[State], Any]:
    return lambda state: state.update({P + rest: torch.zeros(shape, dtype=torch.bfloat16)})


def transposed(rest: str) -> Callable[[State], Any]:
    return lambda state: state.update({P + rest: state[P + rest].transpose(-1, -2).contiguous()})


def fewer_experts(state: State) -> None:
    for name, tensor in state.items():
        if name.endswith(("gate_up_proj", "experts.down_proj", "per_expert_scale", "router.proj.weight")):
            state[name] = tensor[:4].clone()


def one_with_fewer_experts(state: State) -> None:
    state[P + "experts.down_proj"] = state[P + "experts.down_proj"][:5].clone()


def as_float8(state: State) -> None:
    for name in (P + "experts.gate_up_proj", P + "experts.down_proj"):
        state[name] = state[name].to(torch.float8_e4m3fn)


def per_expert(state: State) -> None:
    fused = state.pop(P + "experts.gate_up_proj")
    for expert, rows in enumerate(fused):
        state[f"{P}experts.{expert}.gate_proj.weight"] = rows[:7].clone()
        state[f"{P}experts.{expert}.up_proj.weight"] = rows[7:].clone()


def nothing(_: State) -> None:
    """Leave the state dict as it is."""


def good_config(_: State) -> dict[str, Any]:
    return config_of(random_hf_state_dict())


BAD = [
    Bad("gate_up missing", without("experts.gate_up_proj"), (P + "experts.gate_up_proj", "Incomplete"), good_config),
    Bad("down missing", without("experts.down_proj"), (P + "experts.down_proj", "Incomplete")),
    Bad("scale missing", without("router.per_expert_scale"), (P + "router.per_expert_scale", "Incomplete")),
    Bad("router missing", without("router.proj.weight"), (P + "router.proj.weight", "Incomplete")),
    Bad("router scale missing", without("router.scale"), (P + "router.scale", "Incomplete")),
    Bad("E is not the config's", fewer_experts, ("E = 6 from the config", "[4, "), good_config),
    Bad("one E differs", one_with_fewer_experts, (P + "experts.down_proj", "[6, 10, 7]", "[5, 10, 7]")),
    Bad("down transposed", transposed("experts.down_proj"), (P + "experts.down_proj", "[6, 10, 7]", "[6, 7, 10]")),
    Bad("gate_up transposed", transposed("experts.gate_up_proj"), ("[6, 14, 10]", "[6, 10, 14]"), good_config),
    Bad("router transposed", transposed("router.proj.weight"), (P + "router.proj.weight", "[6, 10]", "[10, 6]")),
    Bad("both spellings", added("moe.down_proj", 6, 10, 7), ("two spellings", P + "moe.down_proj")),
    Bad("a bias of the experts", added("experts.down_proj_bias", 6, 10), (P + "experts.down_proj_bias",)),
    Bad("an unknown router tensor", added("router.bias", 6), (P + "router.bias", "router.per_expert_scale")),
    Bad("an unknown moe tensor", added("moe.gate.bias", 6), (P + "moe.gate.bias",)),
    Bad("nemo names among hf names", added("moe.gate.scale", 10), ("both layouts",)),
    Bad("experts outside a layer", lambda s: s.update({"experts.down_proj": s[P + "experts.down_proj"].clone()}),
        ("outside a layer", "<prefix>layers.<number>.experts.down_proj")),
    Bad("float8 experts", as_float8, (P + "experts.", "float8_e4m3fn", "bfloat16")),
    Bad("per expert", per_expert, ("per-expert", f"{P}experts.")),
    Bad("FP8", added("experts.0.down_proj.weight_scale", 10), ("compressed-tensors FP8",)),
    Bad("NVFP4", added("mlp.down_proj.weight_packed", 10), ("compressed-tensors NVFP4",)),
    Bad("ModelOpt", added("experts.0.down_proj.weight_scale_2", 1), ("ModelOpt NVFP4",)),
    Bad("MLX", added("experts.switch_glu.down_proj.weight", 6, 10, 7), ("MLX",)),
    Bad("DiffusionGemma", lambda s: s.update({"model.decoder.layers.0.router.scale": torch.ones(10)}),
        ("DiffusionGemma",)),
    Bad("LoRA", added("self_attn.q_proj.lora_A.weight", 3, 10), ("LoRA",)),
    Bad("quantization_config", nothing, ("quantised",),
        lambda s: config_of(s) | {"quantization_config": {"quant_method": "fp8"}}),
    Bad("unified", nothing, ("dense",), lambda s: config_of(s) | {"model_type": "gemma4_unified"}),
    Bad("drafter", nothing, ("drafter",), lambda s: config_of(s) | {"model_type": "gemma4_assistant"}),
    Bad("another model", nothing, ("qwen3_moe", "gemma4"), lambda s: config_of(s) | {"model_type": "qwen3_moe"}),
    Bad("a layer that the config counts is missing", nothing, ("layers.2.", "3 layers"),
        lambda s: config_of(s, num_hidden_layers=3)),
    Bad("a layer that the config does not count", nothing, ("layers.1.", "layers 0 to 0"),
        lambda s: config_of(s, num_hidden_layers=1)),
    Bad("E of 10^9", nothing, ("num_experts",), lambda s: config_of(s, num_experts=10**9)),
    Bad("E negative", nothing, ("num_experts", "-6"), lambda s: config_of(s, num_experts=-6)),
    Bad("E a string", nothing, ("num_experts", "'6'"), lambda s: config_of(s, num_experts="6")),
    Bad("E null", nothing, ("num_experts", "None"), lambda s: config_of(s, num_experts=None)),
    Bad("no text_config", nothing, ("text_config",), lambda s: config_of(s) | {"text_config": []}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_is_refused_with_3_and_leaves_nothing(bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_hf_state_dict()
    good = dict(state)
    bad.change(state)
    config = bad.config(good if bad.config is config_of else state)
    source = write_checkpoint(tmp_path / "hf", state, config)
    before = contents(source)
    status, talk = convert(capsys, source, tmp_path / "nemo")
    assert status == 3, talk
    for word in (*bad.words, "next:"):
        assert word in talk
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert contents(source) == before


def damage(name: str) -> Callable[[Path], None]:
    def with_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def damaged(source: Path) -> None:
            path = source / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            change(index)
            path.write_text(json.dumps(index))

        return damaged

    first = "model-00001-of-00002.safetensors"

    def truncate(source: Path) -> None:
        os.truncate(source / first, (source / first).stat().st_size - 1)

    def config(text: bytes) -> Callable[[Path], None]:
        return lambda source: (source / "config.json").write_bytes(text) and None

    return {
        "config missing": lambda source: (source / "config.json").unlink(),
        "config senseless": config(b"{model_type: gemma4}"),
        "config a list": config(b"[]"),
        "config oversized": config(b'{"a": "' + b"x" * (11 * 2**20) + b'"}'),
        "file truncated": truncate,
        "file missing": lambda source: (source / first).unlink(),
        "index naming a parent": with_index(lambda index: index["weight_map"].update({"a": "../x.safetensors"})),
        "index naming a tensor that is not there": with_index(lambda index: index["weight_map"].update({"a": first})),
        "index lacking a tensor": with_index(lambda index: index["weight_map"].pop(P + "router.scale")),
        "stale file": lambda source: (
            (source / "model-00003-of-00003.safetensors").write_bytes((source / first).read_bytes()) and None
        ),
        "pickles only": lambda source: (
            [
                path.rename(path.with_name("pytorch_model.bin"))
                for path in source.iterdir()
                if path.suffix == ".safetensors" or "index" in path.name
            ]
            and None
        ),
        "empty directory": lambda source: [path.unlink() for path in source.iterdir()] and None,
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config missing", ("config.json",)),
        ("config senseless", ("config.json", "JSON")),
        ("config a list", ("config.json", "object")),
        ("config oversized", ("config.json", "10485760")),
        ("file truncated", ("model-00001-of-00002.safetensors", "bytes")),
        ("file missing", ("model-00001-of-00002.safetensors",)),
        ("index naming a parent", ("index", "../x.safetensors")),
        ("index naming a tensor that is not there", ("index", "a")),
        ("index lacking a tensor", (P + "router.scale",)),
        ("stale file", ("model-00003-of-00003.safetensors",)),
        ("pickles only", ("pickle",)),
        ("empty directory", ("no safetensors file",)),
    ],
)
def test_a_damaged_directory_is_refused(
    name: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    damage(name)(source)
    before = contents(source)
    status, talk = convert(capsys, source, tmp_path / "nemo")
    assert status == 3, talk
    for word in (*words, "next:"):
        assert word in talk
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert contents(source) == before


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (".", "is the source"),
        ("inside", "lies inside the source"),
        ("..", "holds the source"),
        ("../missing/nemo", "does not exist"),
        ("../taken", "the target exists"),
        ("../link", "a link"),
        ("../file", "a file"),
    ],
)
def test_a_target_that_may_not_be_written_is_2(
    target: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    status, talk = convert(capsys, source, source / target)
    assert status == 2, talk
    assert words in talk
    assert contents(tmp_path) == before


def test_a_target_inside_the_source_through_a_link_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    (tmp_path / "alias").symlink_to(source)
    status, talk = convert(capsys, source, tmp_path / "alias/nemo")
    assert status == 2
    assert "lies inside the source" in talk
