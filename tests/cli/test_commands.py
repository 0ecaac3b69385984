"""The command line: data on stdout, talk on stderr, exit statuses, and nothing left behind by what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import write_checkpoint
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma4_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def ask(*arguments: object) -> Any:
    """The JSON of a command that succeeds and says nothing else on stdout."""
    done = run(*arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict())


def test_convert_then_verify_then_diff(source: Path, tmp_path: Path) -> None:
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    done = run("convert", source, nemo)
    assert done.returncode == 0, done.stderr
    assert f"gemma4-moe verify {source} {nemo}" in done.stderr
    assert "17 tensors" not in done.stderr, "data belongs on stdout"
    assert ask("verify", source, nemo) == {"tensors": 15, "equal": 15, "different": 0, "differences": []}
    assert ask("convert", nemo, back)["layout"] == "hf"
    assert ask("verify", nemo, back)["different"] == 0
    differing = run("diff", source, back, "--format", "json")
    assert differing.returncode == 4, "without a base the fold stays in the weights, and every scale is one"
    assert json.loads(differing.stdout)["different"] == 4, "down_proj and per_expert_scale of two layers"
    assert run("diff", back, back).returncode == 0


def test_verify_ends_with_4_and_names_the_tensor(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "nemo")
    (file,) = (tmp_path / "nemo").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[4096] ^= 1
    file.write_bytes(raw)
    done = run("verify", source, tmp_path / "nemo")
    assert done.returncode == 4
    assert "model.language_model." in done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = ask("plan", source)
    tried = ask("convert", source, tmp_path / "nemo", "--dry-run")
    assert {key: tried[key] for key in ("source", "target", "peak_memory_bytes")} == {
        key: planned[key] for key in ("source", "target", "peak_memory_bytes")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_base_gives_the_published_experts_back(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "nemo")
    tried = run("convert", tmp_path / "nemo", tmp_path / "back", "--base", tmp_path / "nemo", "--dry-run")
    assert tried.returncode == 2
    assert "the base is in the wrong layout" in tried.stderr
    done = run("convert", tmp_path / "nemo", tmp_path / "back", "--base", source)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(read_directory(tmp_path / "back"), read_directory(source))


def test_inspect_says_layout_and_problems(source: Path, tmp_path: Path) -> None:
    found = ask("inspect", source)
    assert (found["layout"], found["spelling"], found["tensors"]) == ("hf", "current", 17)
    assert found["bytes"] == sum(tensor.nbytes for tensor in read_directory(source).values())
    assert found["problems"] == []
    assert {"name": "model.language_model.layers.{0...1}.router.scale", "tensors": 2}.items() <= next(
        fold for fold in found["folds"] if fold["name"].endswith("router.scale")
    ).items()
    human = run("inspect", source)
    assert "layers.{0...1}.experts.gate_up_proj" in human.stdout
    assert human.stderr == ""


def test_inspect_lists_problems_as_data(tmp_path: Path) -> None:
    state = random_hf_state_dict()
    del state["model.language_model.layers.1.experts.down_proj"]
    found = ask("inspect", write_checkpoint(tmp_path / "hf", state))
    (problem,) = found["problems"]
    assert problem["tensor"] == "model.language_model.layers.1.experts.down_proj"
    assert problem["next"]


def test_quiet_says_nothing_and_no_color_is_heeded(source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "nemo", "-q").stderr == ""
    colored = run("inspect", source, FORCE_COLOR="1").stdout
    assert "\x1b[" in colored
    assert "\x1b[3" not in run("inspect", source, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_an_error_goes_to_stderr_with_its_facts(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "missing")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("gemma4-moe: error: ")
    assert str(tmp_path / "missing") in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("inspect", "-v", tmp_path / "missing").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "a", "b", "--dtype", "int4"],
        ["convert", "a", "b", "--max-memory", "much"],
        ["convert", "a", "b", "--workers", "0"],
        ["unknown"],
        ["plan", "a", "--to", "gguf"],
    ],
)
def test_usage_is_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr


def test_a_closed_pipe_ends_quietly(source: Path) -> None:
    command = f"{sys.executable} -m gemma4_moe inspect {source} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from gemma4_moe.cli import commands
from gemma4_moe.target import journal
original = journal.Ledger.wrote
def wrote(self, *arguments):
    original(self, *arguments)
    if self._count._done > 4096:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
journal.Ledger.wrote = wrote
commands.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_conversion_without_a_trace_and_it_can_be_resumed(
    source: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "convert", source, tmp_path / "nemo"]
    environment = os.environ | {"SIGNAL": str(int(number))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    assert not (tmp_path / "nemo").exists()
    left = tmp_path / ".nemo.gemma4-moe"
    assert re.search(rf"kept on disk: {re.escape(str(left))}, [1-9][0-9,]* bytes", done.stderr)
    assert f"resume with: gemma4-moe convert {source} {tmp_path / 'nemo'} --resume" in done.stderr
    assert f"remove with: gemma4-moe clean {tmp_path / 'nemo'}" in done.stderr
    refused = run("convert", source, tmp_path / "nemo")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    cleaned = run("clean", tmp_path / "nemo")
    assert cleaned.returncode == 0, cleaned.stderr
    assert str(left) in cleaned.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert ask("clean", tmp_path / "nemo") == {"removed": None, "bytes": 0}


PUBLISHING = """
import os, signal, sys
from gemma4_moe.cli import commands
from gemma4_moe.target import transaction
whole = transaction._rename_new
def rename_new(old, new):
    if os.environ["WHEN"] == "before":
        os.kill(os.getpid(), signal.SIGTERM)
    whole(old, new)
    os.kill(os.getpid(), signal.SIGTERM)
transaction._rename_new = rename_new
commands.main(sys.argv[1:])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_sigterm_around_the_rename_leaves_all_or_nothing_and_clean_or_resume_ends_it(
    when: str, source: Path, tmp_path: Path
) -> None:
    target, left = tmp_path / "nemo", tmp_path / ".nemo.gemma4-moe"
    command = [sys.executable, "-c", PUBLISHING, "convert", source, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"WHEN": when})
    assert "Traceback" not in done.stderr
    assert done.returncode == 143, done.stderr
    assert f"resume with: gemma4-moe convert {source} {target} --resume" in done.stderr
    assert left.is_dir()
    if when == "before":
        assert not target.exists()
        assert (left / "out/model.safetensors").exists()
        resumed = run("convert", source, target, "--resume")
        assert resumed.returncode == 0, resumed.stderr
    else:
        refused = run("verify", target)
        assert refused.returncode == 3
        (command_to_type,) = re.findall(r"next: (gemma4-moe clean [^,]+),", refused.stderr)
        assert run(*shlex.split(command_to_type)[1:]).returncode == 0
    assert ask("verify", target)["wrong"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nemo"]
    again = run("convert", source, target, "--resume")
    assert again.returncode == 0, again.stderr


def test_a_resumed_run_that_is_interrupted_again_names_the_same_command(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "convert", source, tmp_path / "nemo", "--resume"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"SIGNAL": str(int(signal.SIGINT))}
    )
    assert done.returncode == 130
    assert f"resume with: gemma4-moe convert {source} {tmp_path / 'nemo'} --resume\n" in done.stderr


def test_verify_of_a_target_alone_checks_its_manifest(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "nemo"
    run("convert", source, target)
    assert ask("verify", target)["wrong"] == []
    (target / "notes.txt").write_text("mine")
    raw = bytearray((target / "model.safetensors").read_bytes())
    raw[4097] ^= 1
    (target / "model.safetensors").write_bytes(raw)
    (target / "tokenizer.json").unlink()
    (target / "config.json").write_text("{}")
    done = run("verify", target)
    assert done.returncode == 4
    for words in (
        "model.safetensors: other bytes in (4096, ",
        "notes.txt: the manifest does not name it",
        "tokenizer.json: missing",
        "config.json: 2 bytes, not ",
    ):
        assert words in done.stdout
    without = run("verify", source)
    assert without.returncode == 3
    assert "gemma4_moe.json" in without.stderr


def test_the_version_and_completion(tmp_path: Path) -> None:
    assert run("--version").stdout == "gemma4-moe, version 0.1.0\n"
    script = run(_GEMMA4_MOE_COMPLETE="bash_source")
    assert "complete" in script.stdout


def test_text_in_a_checkpoint_can_not_drive_the_terminal(tmp_path: Path) -> None:
    state = random_hf_state_dict()
    state["evil\x1b[2J[bold]name"] = state["model.language_model.embed_tokens.weight"].clone()
    source = write_checkpoint(tmp_path / "hf", state)
    done = run("inspect", source)
    assert "\x1b[2J" not in done.stdout
    assert "evil\\x1b[2J[bold]name" in done.stdout


def test_a_hub_id_is_looked_for_in_the_cache_when_offline(tmp_path: Path) -> None:
    done = run("inspect", "google/gemma-4-26B-A4B", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 5
    assert "google/gemma-4-26B-A4B" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr


def test_a_hub_id_in_the_cache_is_used_offline(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--google--small-gemma"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    state = random_hf_state_dict()
    write_checkpoint(repository / "snapshots" / commit, state)
    done = run("convert", "google/small-gemma", tmp_path / "nemo", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_directory(tmp_path / "nemo").keys() == nemo_from_hf(state).keys()


def test_a_revision_of_a_directory_is_a_usage_error(source: Path) -> None:
    assert run("inspect", source, "--revision", "main").returncode == 2


def test_names_that_the_terminal_can_not_encode_are_shown_as_escapes(tmp_path: Path) -> None:
    state = random_hf_state_dict()
    state["größe"] = state["model.language_model.embed_tokens.weight"].clone()
    source = write_checkpoint(tmp_path / "hf", state)
    done = run("inspect", source, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6\\xdfe" in done.stdout


@pytest.mark.parametrize("layout", ["hf", "nemo"])
def test_to_names_a_layout_as_it_is_written_everywhere(source: Path, tmp_path: Path, layout: str) -> None:
    other = tmp_path / "nemo"
    assert ask("convert", source, other, "--to", "nemo")["layout"] == "nemo"
    start = other if layout == "hf" else source
    assert ask("plan", start, "--to", layout)["target"]["layout"] == layout


def test_the_next_command_can_be_pasted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a b", random_hf_state_dict())
    done = run("convert", source, tmp_path / "c d")
    assert f"gemma4-moe verify '{source}' '{tmp_path / 'c d'}'" in done.stderr


def test_a_tilde_is_the_home_directory_in_every_path(source: Path, tmp_path: Path) -> None:
    for arguments in (
        ["convert", "~/hf", "~/nemo", "--dry-run"],
        ["convert", "~/hf", "~/nemo"],
        ["convert", "~/nemo", "~/back", "--base=~/hf"],
        ["diff", "~/hf", "~/back"],
        ["clean", "~/back"],
    ):
        done = run(*arguments, HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "nemo"]


def test_a_full_disk_under_stdout_is_5(source: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "gemma4_moe", "inspect", str(source)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_what_is_no_size_and_no_hub_id_is_said_so(source: Path) -> None:
    assert run("plan", source, "--max-shard-size", "9" * 400).returncode == 0, "one file for all"
    done = run("inspect", "foo/bar.git")
    assert done.returncode == 3
    assert "no such directory" in done.stderr


def test_verify_alone_says_that_a_directory_without_a_manifest_needs_its_source(source: Path) -> None:
    done = run("verify", source)
    assert done.returncode == 3
    assert "has no manifest" in done.stderr
    assert "verify SRC DST" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../config.json": manifest["files"]["config.json"]}),
        lambda manifest: manifest["files"]["config.json"]["pieces"].append([9, 10, "00"]),
        lambda manifest: manifest["files"]["config.json"].update(pieces=[]),
        lambda manifest: manifest["source"].update(files=[]),
        lambda manifest: manifest.update(options=[]),
    ],
)
def test_a_manifest_that_convert_did_not_write_is_not_trusted(source: Path, tmp_path: Path, change: Any) -> None:
    target = tmp_path / "nemo"
    assert run("convert", source, target).returncode == 0
    manifest = json.loads((target / "gemma4_moe.json").read_text())
    change(manifest)
    (target / "gemma4_moe.json").write_text(json.dumps(manifest))
    done = run("verify", target)
    assert done.returncode == 3
    assert "not a manifest" in done.stderr
