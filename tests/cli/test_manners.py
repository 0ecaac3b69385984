"""Manners at a terminal: quiet, hints that work when they are typed, sizes, space, and errors as data."""

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma4_moe import convert
from gemma4_moe.cli import commands
from gemma4_moe.errors import command_line
from gemma4_moe.sizes import exact_size, parse_size
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.command import run
from support.interrupted import counted_writes, interrupt
from support.models import random_hf_state_dict


def call(*arguments, status=0):
    """Run the command in this process, where a test can change what it meets."""
    with pytest.raises(SystemExit) as ended:
        commands.main([str(argument) for argument in arguments])
    assert ended.value.code == status


def follow(text):
    """Run the `gemma4-moe` commands of a hint or a message, the first of each alternative."""
    command = re.search(r"gemma4-moe [^;\n]+", text)[0]
    return run(*shlex.split(command)[1:])


def silent(done):
    return (done.stdout, done.stderr) == ("", "")


def test_quiet_prints_nothing_where_all_is_well_and_keeps_what_was_asked_for(source, tmp_path):
    nemo = tmp_path / "nemo"
    assert silent(run("convert", source, nemo, "-q"))
    assert silent(run("verify", source, nemo, "-q"))
    assert silent(run("verify", nemo, "-q"))
    assert silent(run("diff", nemo, nemo, "-q"))
    assert silent(run("clean", nemo, "-q"))
    for asked in ("inspect", "plan"):
        quiet, usual = (re.sub(r"[\d.]+ .B free", "", run(asked, source, *more).stdout) for more in (["-q"], []))
        assert quiet == usual != ""
    assert json.loads(run("verify", nemo, "-q", "--format", "json").stdout)["wrong"] == []
    flip_bit(nemo / "nemo.safetensors", 4097)
    assert "other bytes" in run("verify", nemo, "-q", status=4).stdout


def test_quiet_still_says_what_an_interrupt_leaves_behind(source, tmp_path, capsys, small_blocks):
    with counted_writes(stop_after=40_000):
        call("convert", source, tmp_path / "nemo", "-q", status=130)
    said = capsys.readouterr().err
    for words in ("kept on disk: ", "resume with: ", "remove with: ", "interrupted"):
        assert words in said
    assert "%" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "kind"),
    [
        ("inspect missing --format json", 3, "CheckpointFormatError"),
        ("convert hf hf/inside --format=json", 2, "UsageError"),
        ("convert hf --format json", 2, "MissingParameter"),
        ("plan hf --mesh tp=2 --format json", 2, "UsageError"),
    ],
)
def test_an_error_is_data_too_where_json_is_asked_for(source, arguments, status, kind):
    done = run(*arguments.split(), status=status, cwd=source.parent)
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    assert error["problem"]
    assert error["next"]
    assert error["problem"] in done.stderr


@pytest.mark.parametrize("option", ["--max-shard-size", "--max-memory"])
@pytest.mark.parametrize("size", ["5", "999kB", "0.9MB"])
def test_a_size_that_has_lost_its_unit_is_refused(source, option, size):
    assert "less than 1 MB; write a unit" in run("plan", source, option, size, status=2).stderr


@pytest.mark.parametrize("words", ["gemma4-moe inspect ", "gemma4-moe convert a b --base ", "gemma4-moe convert a "])
def test_directories_are_completed(words):
    number = str(len(words.split()))
    done = run(_GEMMA4_MOE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number)
    assert done.stdout.startswith("dir,")


def test_inspect_ends_with_the_summary_and_lists_tensors_if_asked(source):
    short, whole = (run("inspect", source, *option).stdout for option in ((), ("--tensors",)))
    assert "experts.gate_up_proj" not in short
    assert "experts.gate_up_proj" in whole
    for shown in (short, whole):
        assert shown.splitlines()[-1] == "no problems: can be converted to the nemo layout"


@pytest.mark.parametrize("gone", ["removed", "a dangling link"])
def test_inspect_reports_also_where_a_shard_is_missing(source, gone):
    lost = source / "model-00002-of-00002.safetensors"
    shard_names = sorted(path.name for path in source.glob("*.safetensors"))
    lost.unlink()
    if gone != "removed":
        lost.symlink_to(source / "nowhere")
    done = run("inspect", source, "--format", "json", status=3)
    found = json.loads(done.stdout)
    assert (found["layout"], found["spelling"], found["tensors"]) == ("hf", "current", 17)
    (problem,) = found["problems"]
    assert lost.name in problem["next"]
    assert shard_names[0] not in problem["next"]
    run("convert", source, source.parent / "nemo", status=3)


def test_the_status_of_inspect_is_that_of_convert(tmp_path):
    state = random_hf_state_dict()
    source = write_checkpoint(tmp_path / "hf", state)
    run("inspect", source)
    del state["model.language_model.layers.1.router.scale"]
    broken = write_checkpoint(tmp_path / "broken", state)
    run("inspect", broken, status=3)
    run("convert", broken, tmp_path / "nemo", status=3)


def small_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=free))


def test_a_disk_without_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch, capsys):
    before = contents(tmp_path)
    small_disk(monkeypatch, 50_000)
    call("convert", source, tmp_path / "nemo", status=5)
    said = capsys.readouterr().err
    assert "50,000 bytes free" in said
    assert contents(tmp_path) == before
    call("convert", source, tmp_path / "nemo", "--dry-run", status=5)
    assert "bytes of space are missing" in capsys.readouterr().err
    call("plan", source)
    needed = json.loads(run("convert", source, tmp_path / "other", "--format", "json").stdout)["bytes"]
    small_disk(monkeypatch, needed + 100_000)  # side files
    call("convert", source, tmp_path / "nemo")


def test_an_unfinished_run_has_some_of_the_space_already(source, tmp_path, monkeypatch, small_blocks):
    interrupt(source, tmp_path / "nemo")
    held = sum(path.lstat().st_blocks * 512 for path in (tmp_path / ".nemo.gemma4-moe").rglob("*"))
    whole = sum(path.stat().st_size for path in source.iterdir())
    small_disk(monkeypatch, whole + 20_000 - held)
    with counted_writes():
        convert(source, tmp_path / "nemo", max_shard_size=60_000, resume=True)


def test_another_run_is_told_how_the_first_was_begun_and_both_hints_work(source, tmp_path, capsys, small_blocks):
    with counted_writes(stop_after=40_000):
        call("convert", source, tmp_path / "nemo", "--max-shard-size", "1MB", "--max-memory", "64MiB", status=130)
    begun = f"gemma4-moe convert {source} {tmp_path / 'nemo'} --max-shard-size 1MB --max-memory 64MiB --resume"
    assert f"resume with: {begun}\n" in capsys.readouterr().err
    call("convert", source, tmp_path / "nemo", "--max-shard-size", "2GB", "--resume", status=2)
    said = capsys.readouterr().err
    assert "--max-shard-size was 1MB, is 2GB" in said
    assert f"resume it as it was begun: {begun}; or remove it: gemma4-moe clean " in said
    assert "resume with" not in said, "the command that has just failed"
    call("convert", source, tmp_path / "nemo", status=2)
    assert f"resume it: {begun}; " in capsys.readouterr().err
    call(*shlex.split(begun)[1:])
    run("verify", source, tmp_path / "nemo")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["mv", Path("a b"), Path("c")], "mv 'a b' c"),
        (["gemma4-moe", "verify", Path("-a"), Path("b")], "gemma4-moe verify -- -a b"),
        (["gemma4-moe", "convert", Path("a"), Path("-b"), "--to", "hf"], "gemma4-moe convert a --to hf -- -b"),
        (["mv", "--", Path("-a"), Path("b")], "mv -- -a b"),
    ],
)
def test_paths_that_begin_with_a_dash_stand_after_two(words, line):
    assert command_line(*words) == line


def test_a_hint_with_a_path_that_begins_with_a_dash_works(tmp_path):
    write_checkpoint(tmp_path / "-hf", random_hf_state_dict())
    done = run("convert", "--", "-hf", "-nemo", cwd=tmp_path)
    (command,) = re.findall(r"next: gemma4-moe (.+)", done.stderr)
    run(*shlex.split(command), cwd=tmp_path)
    assert " -- " in command


@pytest.mark.parametrize("size", [1, 999, 10**6, 5 * 10**9, 2**30, 2**20 * 3, 1_500_000, 2**40 + 1])
def test_an_exact_size_is_read_as_the_same_number(size):
    assert parse_size(exact_size(size)) == size
    assert exact_size(5 * 10**9) == "5GB"
    assert exact_size(512 * 2**20) == "512MiB"


def test_a_refused_permission_names_the_directory_that_was_typed(source, tmp_path, monkeypatch, capsys):
    whole = Path.mkdir

    def mkdir(path, *given, **more):
        if path.parent == tmp_path / "shared":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        whole(path, *given, **more)

    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(Path, "mkdir", mkdir)
    call("convert", source, tmp_path / "shared/nemo", status=5)
    said = capsys.readouterr().err
    assert f"file: {tmp_path / 'shared'}\n" in said
    assert ".nemo.gemma4-moe" not in said


def test_exchanged_arguments_are_guessed(source, tmp_path):
    done = run("convert", tmp_path / "nemo", source, status=2)
    assert "exchanged" in done.stderr
    follow(done.stderr)
    run("verify", source, tmp_path / "nemo")
    assert "exchanged" in run("convert", tmp_path / "other", source, "--dry-run", status=2).stderr


def test_files_that_macos_makes_are_ignored(source, tmp_path):
    for name in ("._model-00001-of-00002.safetensors", "._tokenizer.json", "._preprocessor_config.json", ".DS_Store"):
        (source / name).write_bytes(b"\0\5\x16\7")
    done = json.loads(run("convert", source, tmp_path / "nemo", "--format", "json").stdout)
    assert done["skipped"] == []
    assert not [path for path in (tmp_path / "nemo").iterdir() if path.name.startswith(".")]
    (tmp_path / "nemo/._config.json").write_bytes(b"\0\5\x16\7")
    run("verify", tmp_path / "nemo")
    run("convert", source, tmp_path / "nemo", "--overwrite")


def test_overwrite_is_offered_only_where_it_would_work(source, tmp_path):
    run("convert", source, tmp_path / "nemo")
    assert "--overwrite" in run("convert", source, tmp_path / "nemo", status=2).stderr
    (tmp_path / "nemo/notes.txt").write_text("mine")
    refused = run("convert", source, tmp_path / "nemo", status=2).stderr
    assert "--overwrite" not in refused
    assert "name another directory" in refused
