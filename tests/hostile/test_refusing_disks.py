"""Disks that refuse, limits that are met, sources that shrink meanwhile: status 5 or 3, words, and no target."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from gemma4_moe import convert
from gemma4_moe.cli import commands
from gemma4_moe.errors import CheckpointFormatError, SourceChangedError, StorageError, UsageError
from gemma4_moe.target.journal import Journal
from gemma4_moe.target.recovery import clean
from support.checkpoints import contents, write_checkpoint
from support.direct_io import refusing
from support.models import random_hf_state_dict


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=2, E=6, H=40, I=24), files=5)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EIO, "check the disk"),
        (errno.EROFS, "on a disk that can be written"),
        (errno.EACCES, "check the permissions"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "pwrite", "ftruncate", "fsync", "rename"])
def test_a_refusal_has_words_a_next_step_and_status_5(
    call, code, hint, source, tmp_path, capsys,
    monkeypatch,
):  # fmt: skip
    before = contents(source)
    (tmp_path / "nemo").mkdir()  # so that publishing is a plain rename
    with monkeypatch.context() as broken:
        broken.setattr(os, call, refusing(code))
        with pytest.raises(SystemExit) as caught:
            commands.main(["convert", str(source), str(tmp_path / "nemo")])
    talk = capsys.readouterr().err
    assert caught.value.code == 5, talk
    assert os.strerror(code) in talk
    assert hint in talk
    assert str(tmp_path) in talk
    assert list((tmp_path / "nemo").iterdir()) == []
    assert contents(source) == before


def test_what_an_unfinished_run_has_left_can_be_removed_from_a_full_disk(source, tmp_path, monkeypatch):
    target, control = tmp_path / "nemo", tmp_path / ".nemo.gemma4-moe"
    control.mkdir()
    with Journal(control, 0) as journal:
        journal.append(pieces=[("model.safetensors", 0, 9, "hash", {})])
    monkeypatch.setattr(os, "pwrite", refusing(errno.ENOSPC))
    with pytest.raises(UsageError, match="not finished"):
        convert(source, target)
    assert clean(target) is not None
    with pytest.raises(StorageError, match="No space left on device"):
        convert(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


COMMANDS = {
    "inspect": ["inspect", "x"],
    "plan": ["plan", "x"],
    "verify against a manifest": ["verify", "x"],
    "verify": ["verify", "{source}", "x"],
    "diff": ["diff", "{source}", "x"],
    "clean": ["clean", "x"],
    "dry run": ["convert", "{source}", "x", "--dry-run"],
    "convert": ["convert", "{source}", "x"],
    "demo": ["demo", "x"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["links in a circle", "a directory that is gone", "a name that is too long"])
def test_a_path_that_leads_nowhere_is_told_by_every_command(
    place, command, source, tmp_path, capsys,
    monkeypatch,
):  # fmt: skip
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = "x"
    if place == "links in a circle":
        (tmp_path / "here" / "x").symlink_to("x")
    elif place == "a directory that is gone":
        (tmp_path / "here").rmdir()
    else:
        path = "x" * 256
    with pytest.raises(SystemExit) as caught:
        commands.main([path if word == "x" else word.format(source=source) for word in COMMANDS[command]])
    talk = capsys.readouterr().err
    assert caught.value.code == 5, talk
    assert "  file: " in talk
    assert "  next: " in talk


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        (resource.RLIMIT_FSIZE, 50_000, ["File too large"]),
        (resource.RLIMIT_NOFILE, 20, ["Too many open files", "ulimit -n"]),
    ],
)
def test_a_limit_of_the_operating_system_is_met_in_words(limit, value, words, tmp_path):
    state = random_hf_state_dict(layers=3, E=6, H=40, I=24)
    source = write_checkpoint(tmp_path / "hf", state, files=25)
    done = subprocess.run(
        [sys.executable, "-m", "gemma4_moe", "convert", source, tmp_path / "nemo"],
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert all(word in done.stderr for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("buffered", [False, True])
def test_a_source_cut_off_while_it_is_read_is_an_error_and_no_signal(buffered, source, tmp_path):
    def cut(done, total):
        for path in source.glob("*.safetensors"):
            os.truncate(path, 1000)

    with pytest.raises((CheckpointFormatError, SourceChangedError)):
        convert(source, tmp_path / "nemo", max_memory=40_000, progress=cut, buffered=buffered)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
