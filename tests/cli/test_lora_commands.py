"""`gemma4-moe lora`: the function's result, its errors, and its notes."""

import json

import torch

from support.adapters import PREFIX, native_config, random_native, scales_of, write_adapter
from support.checkpoints import contents, write_checkpoint
from support.command import run
from support.models import random_hf_state_dict

NAME = f"{PREFIX}model.language_model.layers.0.moe.gate.proj.lora_B.weight"


def test_it_converts_and_says_what_the_function_says(tmp_path):
    from gemma4_moe import convert_lora

    base = write_checkpoint(tmp_path / "base", random_hf_state_dict() | scales_of())
    write_adapter(tmp_path / "a", random_native() | {NAME: torch.ones(6, 5)}, native_config(), {})
    done = run("lora", tmp_path / "a", tmp_path / "b", "--to", "peft", "--base", base, "--format", "json")
    expected = convert_lora(tmp_path / "a", tmp_path / "c", to="peft", base=scales_of())
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert json.loads(done.stdout) == {
        "target": str(tmp_path / "b"),
        "source_form": "nemo",
        "form": "peft",
        "weights": 10,
        "tensors": 20,
        "bytes": expected.nbytes,
        "notes": list(expected.notes),
    }
    assert "note: " in done.stderr
    assert "router.proj" in done.stderr
    assert "10 weights" in run("lora", tmp_path / "b", tmp_path / "d", "--to", "peft", "--legacy-layout").stdout


def test_without_a_base_it_names_the_option_that_helps(tmp_path):
    write_adapter(tmp_path / "a", random_native(), native_config(), {})
    done = run("lora", tmp_path / "a", tmp_path / "b", "--to", "vllm", status=2)
    assert "--base" in done.stderr
    assert not (tmp_path / "b").exists()
