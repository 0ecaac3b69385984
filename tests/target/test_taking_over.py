"""Two runs to one target: who may take it from whom, and that nobody harms the work of whoever has it now."""

import json
import os

import pytest

from gemma4_moe import convert
from gemma4_moe.cli import commands
from gemma4_moe.errors import TargetBusyError
from gemma4_moe.target import directory, journal
from gemma4_moe.target.recovery import clean, remains
from gemma4_moe.target.transaction import Transaction
from support.checkpoints import contents
from support.interrupted import interrupt, resume

pytestmark = pytest.mark.usefixtures("small_blocks")


def owned_far_away(target):
    """Leave the name of a process of another host, as an interrupted run of it would."""
    control = target.with_name(f".{target.name}.gemma4-moe")
    control.mkdir(exist_ok=True)
    (control / "owner").write_text(json.dumps({"pid": 77, "host": "far-away", "since": 1e9}))


def test_another_hosts_run_is_named_and_left_alone_unless_it_is_broken(source, tmp_path):
    interrupt(source, tmp_path / "nemo")
    owned_far_away(tmp_path / "nemo")
    before = contents(tmp_path)
    for again in (lambda: resume(source, tmp_path / "nemo"), lambda: clean(tmp_path / "nemo")):
        with pytest.raises(TargetBusyError, match="another process is writing this target") as caught:
            again()
        assert caught.value.facts["found"].startswith("process 77 on far-away, since 2001-")
        assert "--break-lock" in str(caught.value)
        assert contents(tmp_path) == before
    resume(source, tmp_path / "nemo", break_lock=True)
    assert (tmp_path / "nemo/nemo-00001-of-00002.safetensors").exists()


def test_what_is_left_beside_a_complete_target_is_not_cleared_away_from_under_an_owner(source, tmp_path):
    convert(source, tmp_path / "nemo", max_shard_size=60_000)
    owned_far_away(tmp_path / "nemo")
    with pytest.raises(TargetBusyError):
        resume(source, tmp_path / "nemo")
    assert remains(tmp_path / "nemo") is not None
    assert resume(source, tmp_path / "nemo", break_lock=True) == 0


def test_a_command_does_not_offer_to_remove_the_others_work_and_breaks_a_lock_where_it_is_told_to(
    source, tmp_path, capsys
):
    interrupt(source, tmp_path / "nemo")
    owned_far_away(tmp_path / "nemo")
    for command, status in (
        (["convert", source, tmp_path / "nemo", "--resume"], TargetBusyError.exit_status),
        (["clean", tmp_path / "nemo"], TargetBusyError.exit_status),
        (["clean", tmp_path / "nemo", "--break-lock"], 0),
    ):
        with pytest.raises(SystemExit) as caught:
            commands.main([str(word) for word in command])
        talk = capsys.readouterr().err
        assert caught.value.code == status, talk
        assert ("process 77 on far-away" in talk) == (status > 0)
        assert "kept on disk" not in talk
        assert "gemma4-moe clean" not in talk
    assert remains(tmp_path / "nemo") is None


def broken_into(target):
    """Take the target from the run that is writing it, as `--break-lock` does on another host, and begin to write."""
    other = Transaction(target, resume=True)
    (other.control / "owner").unlink()
    other.__enter__()
    (other.out / "of-the-other-run").write_text("mine")
    return other


@pytest.mark.parametrize("when", ["before anything is journalled", "while it writes", "at its end"])
def test_a_run_that_is_broken_into_stops_and_leaves_the_other_alone(when, source, tmp_path, monkeypatch):
    others = []
    written = []
    copy_files = directory.copy_files

    def progress(done, total):
        written.append(done)
        if not others and when != "at its end":
            others.append(broken_into(tmp_path / "nemo"))

    def copied(*arguments):
        if when == "at its end":
            others.append(broken_into(tmp_path / "nemo"))
        return copy_files(*arguments)

    monkeypatch.setattr(directory, "copy_files", copied)
    if when == "before anything is journalled":
        monkeypatch.setattr(journal, "FLUSH_BYTES", 2**30)
    with pytest.raises(TargetBusyError, match="has broken this lock") as caught:
        convert(source, tmp_path / "nemo", max_shard_size=60_000, max_memory=60_000, progress=progress)
    assert f"process {os.getpid()} on " in caught.value.facts["found"]
    if when == "while it writes":
        assert written[-1] - written[0] <= 3 * 8192, "it went on for long"
    assert not (tmp_path / "nemo").exists()
    (other,) = others
    assert (other.out / "of-the-other-run").read_text() == "mine"
    other.confirm()
    other.publish(overwrite=False)
    other.__exit__(None, None, None)
    assert (tmp_path / "nemo/of-the-other-run").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nemo"]


def test_the_one_that_comes_second_is_told(source, tmp_path):
    with Transaction(tmp_path / "nemo"), pytest.raises(TargetBusyError) as caught:
        convert(source, tmp_path / "nemo")
    assert f"process {os.getpid()} on " in caught.value.facts["found"]
    convert(source, tmp_path / "nemo")
