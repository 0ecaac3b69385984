"""docs/publish.md: the commands, run in a place such as a training run leaves, end in a directory that is complete."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint.side_files import is_side_file
from gemma4_moe.demo.small_models import build_model, save_model
from support.formulas import assert_same_tensors
from support.hub_server import environment, serving
from support.hub_uploads import receiving
from support.models import read_directory
from support.steps import write_step

PAGE = (Path(__file__).parents[2] / "docs/publish.md").read_text()
SIDE_FILES = re.findall(
    r"`([^`]+)`", "".join(re.findall(r"^\| (`[^|]*) \| [^|]* \|$", PAGE.split("## What a usable model has")[1], re.M))
)
BASE = "google/gemma-4-26B-A4B"
CONSOLIDATED = "checkpoints/epoch_0_step_1000/model/consolidated"


@pytest.fixture
def place(tmp_path):
    """A base on the Hub, a consolidated step of a run that began from it, and a directory in the nemo layout."""
    save_model(build_model(seed=5), tmp_path / "hub")
    for name in SIDE_FILES:
        if not (tmp_path / "hub" / name).exists():
            (tmp_path / "hub" / name).write_text(f"the base's {name}")
    convert(tmp_path / "hub", tmp_path / "gemma-4-nemo")
    for name in SIDE_FILES:
        if name != "config.json":
            (tmp_path / "gemma-4-nemo" / name).unlink()
    step = tmp_path / CONSOLIDATED
    shutil.copytree(tmp_path / "hub", step, ignore=lambda _, names: set(SIDE_FILES) & set(names))
    config = json.loads((tmp_path / "hub/config.json").read_text())
    (step / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/base"}))
    (step / "generation_config.json").write_text("{}")
    with serving(BASE, tmp_path / "hub") as hub:
        yield tmp_path, hub


def shell(place, line):
    where, hub = place
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | environment(hub, where) | {"PATH": path, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(line, shell=True, cwd=where, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(heading):
    """The lines of the first block of commands below a heading."""
    return re.findall(r"^```\n(.*?)^```$", PAGE.split(heading)[1], re.M | re.S)[0].splitlines()


def test_the_side_files_are_those_that_convert_copies():
    assert len(SIDE_FILES) == 8
    assert all(map(is_side_file, SIDE_FILES))


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_run_becomes_the_published_model(place, in_parts):
    where, _ = place
    if in_parts:
        step = where / "checkpoints/epoch_0_step_2000"
        write_step(step, where / CONSOLIDATED, 3)
    publish, login, push = commands("# I fine-tuned")
    shell(place, publish)
    assert login == "hf auth login"
    assert "--push USER/MODEL" in push
    assert_same_tensors(read_directory(where / "gemma-4-tuned"), read_directory(where / "hub"))
    for name in SIDE_FILES:
        if name != "README.md":
            assert (where / "gemma-4-tuned" / name).exists(), name
    assert (where / "gemma-4-tuned/config.json").read_bytes() == (where / "hub/config.json").read_bytes()
    assert "epoch_0_step" in (where / "gemma-4-tuned/README.md").read_text()


def test_the_directory_is_pushed_as_it_is(place):
    where, _ = place
    publish, _, push = commands("# I fine-tuned")
    shell(place, publish)
    with receiving("USER/MODEL", where) as hub:
        shell((where, hub), push)
        assert sorted(hub.files) == sorted(path.name for path in (where / "gemma-4-tuned").iterdir())
        assert hub.created[0]["visibility"] == "private"


def test_a_directory_in_the_nemo_layout_becomes_the_published_model(place, monkeypatch):
    where, _ = place
    for command in [*commands("## A directory in the nemo layout"), *commands("## Check it")]:
        shell(place, command)
    assert_same_tensors(read_directory(where / "gemma-4-hf"), read_directory(where / "hub"))
    assert (where / "gemma-4-hf/chat_template.jinja").read_text() == "the base's chat_template.jinja"
    monkeypatch.chdir(where)
    snippet, tokenizer = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(snippet, "docs/publish.md", "exec"), {})
    assert "AutoTokenizer" in tokenizer  # the small model has none


def test_the_check_by_transformers_finds_a_directory_in_the_nemo_layout(place, monkeypatch):
    where, _ = place
    shutil.copytree(where / "gemma-4-nemo", where / "gemma-4-hf")
    monkeypatch.chdir(where)
    with pytest.raises(OSError, match="no file named"):
        exec(re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)[0], {})
