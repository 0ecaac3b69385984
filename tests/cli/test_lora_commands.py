"""`gemma4-moe lora` and `gemma4-moe merge`: the function's result, its errors, and its notes."""

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


def test_merge_writes_what_the_function_writes_and_a_dry_run_nothing(tmp_path):
    from gemma4_moe import merge

    state = random_hf_state_dict() | scales_of()
    for layer in (0, 1):
        state[f"model.language_model.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(12, 10)
        state[f"model.language_model.layers.{layer}.mlp.down_proj.weight"] = torch.ones(10, 9)
    base = write_checkpoint(tmp_path / "base", state)
    adapter = write_adapter(tmp_path / "a", random_native(), native_config(), {"moe_rank_scaling": True})
    planned = run("merge", base, adapter, tmp_path / "merged", "--dry-run")
    assert "the adapter changes 2" in planned.stdout
    assert not (tmp_path / "merged").exists()
    done = run("merge", base, adapter, tmp_path / "merged", "--to", "nemo", "--format", "json")
    expected = merge(base, adapter, tmp_path / "other", to="nemo")
    assert contents(tmp_path / "merged") == contents(tmp_path / "other")
    found = json.loads(done.stdout)
    assert (found["layout"], found["notes"]) == ("nemo", list(expected.notes))
    assert "note: norm of the change" in done.stderr
    assert "gemma4-moe verify --adapter" in done.stderr
