"""The command line: data on stdout, talk on stderr, exit statuses, and nothing left behind by what is refused."""

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from support.checkpoints import flip_bit, write_checkpoint
from support.command import COMMAND, run
from support.formulas import assert_same_tensors
from support.models import random_hf_state_dict, read_directory


def ask(*arguments):
    """The JSON of a command that succeeds and says nothing else on stdout."""
    return json.loads(run(*arguments, "--format", "json").stdout)


def test_convert_then_verify_then_diff(source, tmp_path):
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    done = run("convert", source, nemo)
    assert f"gemma4-moe verify {source} {nemo}" in done.stderr
    assert "17 tensors" not in done.stderr, "data belongs on stdout"
    assert ask("verify", source, nemo) == {
        "tensors": 15,
        "equal": 15,
        "different": 0,
        "files": {"compared": 2, "equal": 2, "different": 0},
        "folds": [],
        "differences": [],
    }
    assert ask("convert", nemo, back)["layout"] == "hf"
    assert ask("verify", nemo, back)["different"] == 0
    differing = run("diff", source, back, "--format", "json", status=4)
    assert json.loads(differing.stdout)["different"] == 4, "without a base: down_proj and scale of two layers"
    run("diff", back, back)


def test_verify_ends_with_4_and_names_the_tensor(source, tmp_path):
    run("convert", source, tmp_path / "nemo")
    flip_bit(tmp_path / "nemo/nemo.safetensors", 4096)
    assert "model.language_model." in run("verify", source, tmp_path / "nemo", status=4).stdout


def test_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path):
    planned = ask("plan", source)
    tried = ask("convert", source, tmp_path / "nemo", "--dry-run")
    for key in ("source", "target", "peak_memory_bytes"):
        assert tried[key] == planned[key]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_base_gives_the_published_experts_back(source, tmp_path):
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    run("convert", source, nemo)
    tried = run("convert", nemo, back, "--base", nemo, "--dry-run", status=2)
    assert "the base is in the wrong layout" in tried.stderr
    run("convert", nemo, back, "--base", source)
    assert_same_tensors(read_directory(back), read_directory(source))


def test_inspect_says_layout_and_problems(source):
    found = ask("inspect", source)
    assert (found["layout"], found["spelling"], found["tensors"]) == ("hf", "current", 17)
    assert found["bytes"] == sum(tensor.nbytes for tensor in read_directory(source).values())
    assert found["problems"] == []
    (scale,) = (fold for fold in found["folds"] if fold["name"].endswith("router.scale"))
    assert (scale["name"], scale["tensors"]) == ("model.language_model.layers.{0...1}.router.scale", 2)
    human = run("inspect", source, "--tensors")
    assert "layers.{0...1}.experts.gate_up_proj" in human.stdout
    assert human.stderr == ""


def test_inspect_lists_problems_as_data_and_in_red_unless_no_color_is_set(tmp_path):
    state = random_hf_state_dict()
    del state["model.language_model.layers.1.experts.down_proj"]
    source = write_checkpoint(tmp_path / "hf", state)
    (problem,) = json.loads(run("inspect", source, "--format", "json", status=3).stdout)["problems"]
    assert problem["tensor"] == "model.language_model.layers.1.experts.down_proj"
    assert problem["next"]
    red = "\x1b[1;31m"
    assert red in run("inspect", source, status=3, FORCE_COLOR="1").stdout
    assert red not in run("inspect", source, status=3, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_convert_to_nemo_alone_says_who_loads_the_result(source, tmp_path):
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    said = "loaded by torch's dcp.load and read by gemma4-moe; NeMo AutoModel, transformers and vLLM want hf\n"
    done = run("convert", source, nemo)
    assert said in done.stderr
    assert "dcp.load" not in done.stdout
    assert "dcp.load" not in run("convert", nemo, back).stderr


def test_quiet_says_nothing(source, tmp_path):
    assert run("convert", source, tmp_path / "nemo", "-q").stderr == ""


def test_an_error_goes_to_stderr_with_its_facts(tmp_path):
    done = run("inspect", tmp_path / "missing", status=3)
    assert done.stdout == ""
    assert done.stderr.startswith("gemma4-moe: error: ")
    assert str(tmp_path / "missing") in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("inspect", "-v", tmp_path / "missing", status=3).stderr


@pytest.mark.parametrize(
    "arguments",
    ["convert", "convert a b --dtype int4", "convert a b --max-memory much", "convert a b --workers 0", "unknown",
     "plan a --to gguf"],
)  # fmt: skip
def test_usage_is_2(arguments):
    done = run(*arguments.split(), status=2)
    assert done.stdout == ""
    assert "Usage:" in done.stderr


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


@pytest.mark.parametrize("options", [[], ["--resume"]])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_conversion_without_a_trace_and_it_can_be_resumed(source, tmp_path, number, status, options):
    target, left = tmp_path / "nemo", tmp_path / ".nemo.gemma4-moe"
    command = ["convert", source, target]
    done = run(*command, *options, program=INTERRUPTED, SIGNAL=str(int(number)), status=status)
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert re.search(rf"kept on disk: {re.escape(str(left))}, [1-9][0-9,]* bytes", done.stderr)
    assert f"resume with: gemma4-moe convert {source} {target} --resume\n" in done.stderr
    assert f"remove with: gemma4-moe clean {target}" in done.stderr
    assert "--resume" in run(*command, status=2).stderr
    assert str(left) in run("clean", target).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert ask("clean", target) == {"removed": None, "bytes": 0}


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
def test_sigterm_around_the_rename_leaves_all_or_nothing_and_clean_or_resume_ends_it(when, source, tmp_path):
    target, left = tmp_path / "nemo", tmp_path / ".nemo.gemma4-moe"
    done = run("convert", source, target, program=PUBLISHING, WHEN=when, status=143)
    assert "Traceback" not in done.stderr
    assert f"resume with: gemma4-moe convert {source} {target} --resume" in done.stderr
    assert left.is_dir()
    if when == "before":
        assert not target.exists()
        assert (left / "out/nemo.safetensors").exists()
        run("convert", source, target, "--resume")
    else:
        refused = run("verify", target, status=3)
        (command_to_type,) = re.findall(r"next: (gemma4-moe clean [^;]+);", refused.stderr)
        run(*shlex.split(command_to_type)[1:])
    assert ask("verify", target)["wrong"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nemo"]
    run("convert", source, target, "--resume")


def test_verify_of_a_target_alone_checks_its_manifest(source, tmp_path):
    target = tmp_path / "nemo"
    run("convert", source, target)
    assert ask("verify", target)["wrong"] == []
    assert "3 files, " in (well := run("verify", target).stdout)
    assert well.endswith(" bytes: as the manifest says\n")
    (target / "notes.txt").write_text("mine")
    flip_bit(target / "nemo.safetensors", 4097)
    (target / "tokenizer.json").unlink()
    (target / "config.json").write_text("{}")
    done = run("verify", target, status=4)
    for words in (
        "nemo.safetensors: other bytes in (4096, ",
        "notes.txt: the manifest does not name it",
        "tokenizer.json: missing",
        "config.json: 2 bytes, not ",
    ):
        assert words in done.stdout
    assert " bytes: 0 as the manifest says, 3 not; 1 file that it does not name\n" in done.stdout
    found = json.loads(run("verify", target, "--format", "json", status=4).stdout)
    assert (found["files"], found["equal"], found["different"], found["unknown"]) == (3, 0, 3, 1)
    without = run("verify", source, status=3)
    for words in ("gemma4_moe.json", "has no manifest", "verify SRC DST"):
        assert words in without.stderr


def test_the_version_and_completion():
    assert run("--version").stdout == "gemma4-moe, version 0.1.0\n"
    assert "complete" in run(_GEMMA4_MOE_COMPLETE="bash_source").stdout


@pytest.mark.parametrize(
    ("name", "shown", "encoding"),
    [("evil\x1b[2J[bold]name", r"evil\x1b[2J[bold]name", "utf-8"), ("größe", r"gr\xf6\xdfe", "ascii")],
)
def test_a_name_that_a_terminal_obeys_or_can_not_encode_is_shown_escaped(name, shown, encoding, tmp_path):
    state = random_hf_state_dict()
    state[name] = state["model.language_model.embed_tokens.weight"].clone()
    source = write_checkpoint(tmp_path / "hf", state)
    done = run("inspect", source, "--tensors", PYTHONIOENCODING=encoding)
    assert "\x1b[2J" not in done.stdout
    assert shown in done.stdout


def test_to_names_a_layout_as_it_is_written_everywhere(source, tmp_path):
    assert ask("convert", source, tmp_path / "nemo", "--to", "nemo")["layout"] == "nemo"
    assert ask("plan", source, "--to", "nemo")["target"]["layout"] == "nemo"
    assert ask("plan", tmp_path / "nemo", "--to", "hf")["target"]["layout"] == "hf"


def test_the_next_command_can_be_pasted(tmp_path):
    source = write_checkpoint(tmp_path / "a b", random_hf_state_dict())
    done = run("convert", source, tmp_path / "c d")
    assert f"gemma4-moe verify '{source}' '{tmp_path / 'c d'}'" in done.stderr


def test_a_tilde_is_the_home_directory_in_every_path(source, tmp_path):
    for arguments in (
        "convert ~/hf ~/nemo --dry-run",
        "convert ~/hf ~/nemo",
        "convert ~/nemo ~/back --base=~/hf",
        "diff ~/hf ~/back",
        "clean ~/back",
    ):
        run(*arguments.split(), HOME=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "nemo"]


def test_a_full_disk_under_stdout_is_5(source):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "inspect", source], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_a_file_may_be_as_large_as_one_likes(source):
    assert ask("plan", source, "--max-shard-size", "9" * 400)["target"]["files"] == 1


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
def test_a_manifest_that_convert_did_not_write_is_not_trusted(source, tmp_path, change):
    run("convert", source, tmp_path / "nemo")
    path = tmp_path / "nemo/gemma4_moe.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert "not a manifest" in run("verify", tmp_path / "nemo", status=3).stderr
