"""The demo passes on sound code, fails on broken code, and says which."""

import errno
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gemma4_moe import kernels
from gemma4_moe.demo import small_models
from gemma4_moe.demo.demo import run_demo
from gemma4_moe.errors import DifferenceError, StorageError, UsageError

STEPS = ["build", "hf → nemo", "nemo → hf", "from_pretrained", "logits", "control"]


class Shown:
    """The checks that the demo shows."""

    def __call__(self, checks):
        self.checks = checks
        self.passed = {check.step: check.passed for check in checks}


@pytest.fixture
def shown():
    return Shown()


def test_every_step_passes_and_the_checkpoints_stay_unless_they_were_temporary(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_demo(None, show=shown)
    assert list(tmp_path.iterdir()) == []
    run_demo(tmp_path / "demo", show=shown)
    assert shown.passed == dict.fromkeys(STEPS, True)
    assert list(shown.passed) == STEPS
    assert sorted(entry.name for entry in (tmp_path / "demo").iterdir()) == ["hf", "hf-again", "nemo"]
    assert [check.files > 2 for check in shown.checks if check.files is not None] == [True, True, True]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_disk_that_refuses_is_told(error, shown, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(small_models, "save_model", refuse)
    with pytest.raises(StorageError, match=r"can't write the model: .*No space left on device") as caught:
        run_demo(tmp_path / "demo", show=shown)
    assert caught.value.facts["file"] == str(tmp_path / "demo/hf")


def test_a_fold_that_is_left_out_is_a_difference(shown, tmp_path, monkeypatch):
    sound = kernels.scale_cast
    monkeypatch.setattr(kernels, "scale_cast", lambda x, **options: sound(x, **options | {"scale": None}))
    with pytest.raises(DifferenceError) as caught:
        run_demo(tmp_path / "demo", show=shown)
    assert caught.value.exit_status == 4
    assert caught.value.facts["found"] == "✗ at hf → nemo, logits"
    assert shown.passed == dict.fromkeys(STEPS, True) | {"hf → nemo": False, "logits": False}


def test_a_model_whose_logits_would_not_tell_is_not_called_a_success(shown, tmp_path, monkeypatch):
    def insensitive(kind):
        model = small_models_build(kind)
        for name, parameter in model.named_parameters():
            if name.endswith("per_expert_scale"):
                torch.nn.init.ones_(parameter)
        return model

    small_models_build = small_models.build_model
    monkeypatch.setattr(small_models, "build_model", insensitive)
    with pytest.raises(DifferenceError, match="✗ at control"):
        run_demo(tmp_path / "demo", show=shown)
    assert shown.passed == dict.fromkeys(STEPS, True) | {"control": False}


def test_a_directory_with_something_in_it_is_left_alone(shown, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tmp_path, show=shown)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_shows_every_step(as_json, tmp_path):
    command = [sys.executable, "-m", "gemma4_moe", "demo", tmp_path, "--format", "json" if as_json else "human"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if as_json:
        found = json.loads(out)
        assert found["passed"] is True
        assert [check["step"] for check in found["checks"]] == STEPS
    else:
        assert [next(line for line in out.splitlines() if line.startswith(f" {step} ")) for step in STEPS]
        assert out.count("✓") == len(STEPS)


def test_a_missing_library_is_named(shown, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="pip install") as caught:
        run_demo(tmp_path / "demo", show=shown)
    assert "transformers" in caught.value.facts["found"]
    (extra,) = re.findall(r"gemma4-moe\[(\w+)\]", str(caught.value.hint))
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    requirements = pyproject["project"]["optional-dependencies"][extra]
    assert any(requirement.startswith("transformers>=") for requirement in requirements)


def test_importing_the_demo_loads_neither_torch_nor_rich():
    code = "import sys, gemma4_moe.demo.demo; sys.exit(' '.join({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
