"""docs/training-runs.md: its commands, run one after the other in a place with a run, a torch step and their base."""

import json
import shlex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from support.checkpoints import write_checkpoint
from support.command import run
from support.documents import ROOT, blocks
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import module_of, random_hf_state_dict, read_directory
from support.steps import write_step

PAGE = (ROOT / "docs/training-runs.md").read_text()
COMMANDS = [line for block in blocks(PAGE, "") for line in block.splitlines()]


@pytest.fixture
def place(tmp_path):
    base = random_hf_state_dict(E=6, H=40, I=24)
    trained = hf_from_nemo(nemo_from_hf(base))
    write_checkpoint(tmp_path / "base", base)
    whole = write_checkpoint(tmp_path / "whole", trained)
    for step in (10, 20):
        write_step(tmp_path / f"checkpoints/epoch_0_step_{step}", whole, 2, experts_on_axis_1=2)
    (tmp_path / "checkpoints/LOWEST_VAL").symlink_to("epoch_0_step_10")
    (tmp_path / "checkpoints/losses.json").write_text(json.dumps({}))
    dcp.save({"model": trained, "epoch": 3}, storage_writer=FileSystemWriter(tmp_path / "step"), no_dist=True)
    return tmp_path, base, trained


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_commands_of_the_page(place, monkeypatch):
    where, base, trained = place
    for line in COMMANDS:
        run(*shlex.split(line)[1:], cwd=where)
    for name in ("gemma-4-tuned", "gemma-4-hf"):
        assert_same_tensors(read_directory(where / name), base)
    assert_same_tensors(read_directory(where / "gemma-4-whole"), trained)
    for name in ("gemma-4-native", "gemma-4-nemo"):
        assert_same_tensors(read_directory(where / name), nemo_from_hf(base))
    monkeypatch.chdir(where)
    model = module_of({name: torch.zeros_like(tensor) for name, tensor in nemo_from_hf(base).items()})
    (snippet,) = blocks(PAGE, "python")
    names = {}
    exec(compile(snippet, "docs/training-runs.md", "exec"), names)
    names["begin"](model)
    assert_same_tensors(model.state_dict(), nemo_from_hf(base))
