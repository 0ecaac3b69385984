"""`--stream`: a model on the Hub is converted in place, over a server of our own, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.checkpoints import contents, write_checkpoint
from support.hub_server import COMMIT, Hub, serving
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "google/small-gemma"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict())


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with serving(MODEL, source) as hub:
        yield hub


def run(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "home"), "TMPDIR": str(home)}
    (home / "home").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "gemma4_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_target_is_that_of_the_same_directory_and_nothing_is_kept(hub: Hub, source: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 0, done.stderr
    run(hub, tmp_path, "convert", source, tmp_path / "local")
    streamed, local = contents(tmp_path / "nemo"), contents(tmp_path / "local")
    assert {name for name in local if streamed[name] != local[name]} == {"gemma4_moe.json"}
    manifest = json.loads((tmp_path / "nemo/gemma4_moe.json").read_text())
    assert manifest["options"].pop("commit") == COMMIT
    here = json.loads((tmp_path / "local/gemma4_moe.json").read_text())
    assert manifest == here
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "home", "local", "nemo"]
    assert contents(tmp_path / "home") == {}
    assert all(asked is not None for name, asked in hub.requests if name.endswith(".safetensors"))
    assert run(hub, tmp_path, "verify", tmp_path / "nemo").returncode == 0


def test_a_plan_reads_headers_alone(hub: Hub, source: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "plan", MODEL, "--stream", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"]["tensors"] == 17
    weights = [asked for name, asked in hub.requests if name.endswith(".safetensors")]
    assert len(weights) == 4, "a length and a header of each of two files"


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.busy = 1
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream").returncode == 0


def test_an_answer_that_is_too_short_is_no_data(hub: Hub, tmp_path: Path) -> None:
    hub.cut = True
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 5
    assert "the range that was asked for" in done.stderr
    assert not (tmp_path / "nemo").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([MODEL, "--revision", "nowhere"], 3, "no such model or revision"),
        (["google/unknown"], 3, "no such model or revision"),
        (["hf"], 2, "only a model on the Hub can be streamed"),
    ],
)
def test_what_is_not_there_is_told(arguments: list[str], status: int, words: str, hub: Hub, tmp_path: Path) -> None:
    model, *options = arguments
    done = run(hub, tmp_path, "convert", model, tmp_path / "nemo", "--stream", *options)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_connection_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 5
    assert "the Hub can't be read" in done.stderr
