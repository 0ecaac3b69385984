"""The demo passes on sound code, fails on broken code, and says which."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from gemma4_moe import kernels
from gemma4_moe.demo import small_models
from gemma4_moe.demo.demo import run_demo
from gemma4_moe.errors import DifferenceError, StorageError, UsageError

STEPS = ["build", "hf → nemo", "nemo → hf", "from_pretrained", "logits", "control"]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> dict[str, str]:
    """Each step of the printed table, with its mark."""
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return {
        step: mark
        for step in STEPS
        for mark in "✓✗"
        if any(line.startswith(f" {step} ") and mark in line for line in lines)
    }


def test_every_step_passes_and_the_checkpoints_stay(console: Console, tmp_path: Path) -> None:
    checks = run_demo(tmp_path / "demo", console=console)
    assert printed(console) == dict.fromkeys(STEPS, "✓")
    assert [check.step for check in checks] == STEPS
    assert sorted(entry.name for entry in (tmp_path / "demo").iterdir()) == ["hf", "hf-again", "nemo"]
    assert [check.files > 2 for check in checks if check.files is not None] == [True, True, True]


def test_a_temporary_directory_is_removed(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_demo(console=console)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_disk_that_refuses_is_told(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(small_models, "save_model", refuse)
    with pytest.raises(StorageError, match=r"can't write the model: .*No space left on device") as caught:
        run_demo(tmp_path / "demo")
    assert caught.value.facts["file"] == str(tmp_path / "demo/hf")


def test_a_fold_that_is_left_out_is_a_difference(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = kernels.transpose_scale_cast
    monkeypatch.setattr(kernels, "transpose_scale_cast", lambda x, **options: sound(x, **options | {"scale": None}))
    with pytest.raises(DifferenceError) as caught:
        run_demo(tmp_path / "demo", console=console)
    assert caught.value.exit_status == 4
    assert caught.value.facts["found"] == "✗ at hf → nemo, logits"
    assert printed(console) == dict.fromkeys(STEPS, "✓") | {"hf → nemo": "✗", "logits": "✗"}


def test_a_model_whose_logits_would_not_tell_is_not_called_a_success(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def insensitive(kind: Any) -> Any:
        model = small_models_build(kind)
        for name, parameter in model.named_parameters():
            if name.endswith("per_expert_scale"):
                torch.nn.init.ones_(parameter)
        return model

    small_models_build = small_models.build_model
    monkeypatch.setattr(small_models, "build_model", insensitive)
    with pytest.raises(DifferenceError, match="✗ at control"):
        run_demo(tmp_path / "demo", console=console)
    assert printed(console) == dict.fromkeys(STEPS, "✓") | {"control": "✗"}


def test_a_directory_with_something_in_it_is_left_alone(console: Console, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tmp_path, console=console)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_missing_library_is_named(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="pip install") as caught:
        run_demo(tmp_path / "demo", console=console)
    assert "transformers" in caught.value.facts["found"]
    (extra,) = re.findall(r"gemma4-moe\[(\w+)\]", str(caught.value.hint))
    assert any(line.startswith("transformers>=") for line in _extras()[extra])


def _extras() -> dict[str, list[str]]:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras: dict[str, list[str]] = pyproject["project"]["optional-dependencies"]
    return extras


def test_importing_the_demo_loads_neither_torch_nor_rich() -> None:
    code = "import sys, gemma4_moe.demo.demo; sys.exit(' '.join({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
