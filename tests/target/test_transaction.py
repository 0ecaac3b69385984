"""Publishing: new, into an empty directory, over an old one; in one step or in two; and healing what was cut off."""

import errno
import os
from functools import partial

import pytest

from gemma4_moe.checkpoint.directory import control_directory
from gemma4_moe.errors import SourceChangedError, StorageError, UsageError
from gemma4_moe.target import recovery, transaction
from gemma4_moe.target.journal import Journal, read_journals
from gemma4_moe.target.recovery import clean, heal, remains
from gemma4_moe.target.transaction import Transaction
from support.direct_io import refusing
from support.order import Order


class Killed(BaseException):
    """What a test raises where a process would have been killed."""


@pytest.fixture
def target(tmp_path):
    return tmp_path / "nemo"


@pytest.fixture
def two_steps(monkeypatch):
    """Run as on a filesystem that can't exchange two directories."""
    monkeypatch.setattr(transaction, "exchange", lambda *_: False)


def write(target, text, *, overwrite=False):
    with Transaction(target) as work:
        (work.out / "file").write_text(text)
        work.publish(overwrite=overwrite)


def entries(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_only(target, text):
    """Fail unless the target holds this text, and nothing is beside it."""
    assert (target / "file").read_text() == text
    assert entries(target.parent) == ["nemo"]


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "an old one"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_target_appears_whole(exchanges, there, target, request):
    if not exchanges:
        request.getfixturevalue("two_steps")
    if there == "an empty directory":
        target.mkdir()
    elif there == "an old one":
        write(target, "old")
    write(target, "new", overwrite=there == "an old one")
    assert_only(target, "new")


def directory_of_mine(target):
    target.mkdir()
    (target / "mine").write_text("mine")


@pytest.mark.parametrize(
    "appear",
    [
        directory_of_mine,
        lambda target: target.write_text("mine"),
        lambda target: target.symlink_to("nowhere"),
        lambda target: target.symlink_to(target.parent.parent),
    ],
)
def test_what_has_come_into_being_meanwhile_is_not_touched(appear, target):
    def write_while_it_appears():
        with Transaction(target) as work:
            (work.out / "file").write_text("new")
            appear(target)
            work.publish(overwrite=False)

    with pytest.raises(UsageError, match="come into being"):
        write_while_it_appears()
    assert entries(target.parent) == ["nemo"]
    assert not (target / "file").exists()


def test_without_publish_nothing_stays(target):
    with Transaction(target) as work:
        (work.out / "file").write_text("x")
    assert entries(target.parent) == []
    with pytest.raises(KeyError), Transaction(target) as work:
        raise KeyError
    assert entries(target.parent) == []


def test_what_a_killed_run_has_left_without_a_journal_is_not_taken_along(target):
    (control_directory(target) / "out").mkdir(parents=True)
    (control_directory(target) / "out/stale").write_text("x")
    (control_directory(target) / "old").mkdir()
    write(target, "new")
    assert entries(target) == ["file"]
    assert entries(target.parent) == ["nemo"]


def test_a_kill_while_an_unfinished_run_is_removed_leaves_no_journal_of_what_is_gone(target, monkeypatch):
    def killed(_):
        raise Killed

    control = control_directory(target)
    (control / "out").mkdir(parents=True)
    with Journal(control, 0) as journal:
        journal.append(pieces=[("file", 0, 9, "hash", {})])
    monkeypatch.setattr(recovery.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        clean(target)
    assert (control / "out").exists()
    assert read_journals(control).pieces == {}


def killed_in(monkeypatch, target, name, when):
    """Overwrite `target`, and end as a kill would just before call number `when` of a function."""
    whole, calls = getattr(transaction, name), []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == when:
            raise Killed
        return whole(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(transaction, name, count)
        patched.setattr(Transaction, "__exit__", lambda self, *_: os.close(self._lock._descriptor))
        with pytest.raises(Killed):
            write(target, "new", overwrite=True)


def kill_between_the_renames(monkeypatch, target):
    def only_the_first(_, target, old):
        target.rename(old)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(transaction, "_replace", only_the_first)
        patched.setattr(Transaction, "__exit__", lambda self, *_: os.close(self._lock._descriptor))
        with pytest.raises(Killed):
            write(target, "new", overwrite=True)
    assert not target.exists()


@pytest.mark.usefixtures("two_steps")
@pytest.mark.parametrize("by", ["heal", "the next writer"])
def test_a_kill_between_the_two_renames_is_healed(by, target, monkeypatch):
    write(target, "old")
    kill_between_the_renames(monkeypatch, target)
    assert not target.exists()
    if by == "heal":
        heal(target)
    else:
        with pytest.raises(KeyError), Transaction(target):
            raise KeyError
    assert_only(target, "new")


def after_the_first_rename(monkeypatch, act, times=1):
    """Act before each of the next `times` renames, when neither the old directory nor the new one is in its place."""
    whole, calls = os.rename, []

    def rename(one, other):
        calls.append(one)
        if 2 <= len(calls) < 2 + times:
            act()
        whole(one, other)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.usefixtures("two_steps")
@pytest.mark.parametrize("journalled", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=repr)
def test_a_failure_between_the_two_renames_leaves_the_old_one(error, journalled, target, monkeypatch):
    def fail():
        assert not target.exists()
        raise error

    def overwrite():
        with Transaction(target) as work:
            (work.out / "file").write_text("new")
            if journalled:
                with Journal(work.control, 0) as journal:
                    journal.append(pieces=[("file", 0, 9, "hash", {})])
            after_the_first_rename(monkeypatch, fail)
            work.publish(overwrite=True)

    write(target, "old")
    with pytest.raises((KeyboardInterrupt, StorageError)):
        overwrite()
    assert (target / "file").read_text() == "old"
    assert (remains(target) is not None) == journalled


@pytest.mark.usefixtures("two_steps")
def test_neither_is_deleted_while_the_old_one_can_not_be_put_back(target, monkeypatch):
    write(target, "old")
    with monkeypatch.context() as failing:
        after_the_first_rename(failing, refusing(errno.EIO), times=2)
        with pytest.raises(StorageError, match="can't publish the target"):
            write(target, "new", overwrite=True)
    assert not target.exists()
    heal(target)
    assert_only(target, "new")


@pytest.mark.usefixtures("two_steps")
def test_what_appears_between_the_two_renames_is_not_touched(target, monkeypatch):
    write(target, "old")
    after_the_first_rename(monkeypatch, partial(directory_of_mine, target))
    with pytest.raises(UsageError, match="come into being"):
        write(target, "new", overwrite=True)
    assert entries(target) == ["mine"]
    assert (control_directory(target) / "old/file").read_text() == "old"


def test_a_kill_after_the_exchange_is_healed(target, monkeypatch):
    write(target, "old")
    killed_in(monkeypatch, target, "sync_directory", 5)
    assert (target / "file").read_text() == "new"
    assert remains(target) is not None
    heal(target)
    assert_only(target, "new")


def test_a_kill_before_the_exchange_leaves_the_old_one(target, monkeypatch):
    write(target, "old")
    killed_in(monkeypatch, target, "_replace", 1)
    heal(target)
    assert (target / "file").read_text() == "old"
    assert (control_directory(target) / "out/file").read_text() == "new", "a run that may still be resumed"
    assert clean(target) is not None
    assert_only(target, "old")


def test_a_torn_note_of_publishing_heals_nothing(target, monkeypatch):
    write(target, "old")
    killed_in(monkeypatch, target, "_replace", 1)
    (control_directory(target) / "publishing").write_text('{"ino')
    heal(target)
    assert (target / "file").read_text() == "old"
    write(target, "newer", overwrite=True)
    assert_only(target, "newer")


CONTROL = ".nemo.gemma4-moe"
BEFORE = [("fsync", CONTROL), ("fsync", ".")]
READY = [("fsync", f"{CONTROL}/out"), ("fsync", f"{CONTROL}/publishing"), ("fsync", CONTROL)]


@pytest.mark.parametrize("there", ["nothing", "empty", "old", "old, in two steps"])
def test_all_is_on_the_device_before_the_next_step(there, target, monkeypatch):
    if there == "empty":
        target.mkdir()
    elif there != "nothing":
        write(target, "old")
    order = Order(target.parent, monkeypatch)
    if there == "old, in two steps":
        monkeypatch.setattr(transaction, "exchange", lambda *_: False)
    write(target, "new", overwrite=True)
    renames = {
        "nothing": [("rename", f"{CONTROL}/out", "nemo")],
        "empty": [("rename", f"{CONTROL}/out", "nemo")],
        "old": [("exchange", f"{CONTROL}/out", "nemo")],
        "old, in two steps": [("rename", "nemo", f"{CONTROL}/old"), ("rename", f"{CONTROL}/out", "nemo")],
    }[there]
    published = [*BEFORE, *READY, *renames, ("fsync", ".")]
    assert order.calls[: len(published)] == published
    assert order.calls[-1] == ("rmdir", CONTROL)
    assert all(call[0] == "rmdir" for call in order.calls[len(published) :])


@pytest.mark.usefixtures("two_steps")
def test_healing_brings_the_rename_to_the_device_first(target, monkeypatch):
    write(target, "old")
    kill_between_the_renames(monkeypatch, target)
    order = Order(target.parent, monkeypatch)
    heal(target)
    assert order.calls[:2] == [("rename", f"{CONTROL}/out", "nemo"), ("fsync", ".")]
    assert order.calls[-1] == ("rmdir", CONTROL)


def test_another_process_at_work_is_left_alone(target):
    with Transaction(target) as work:
        (work.control / "publishing").write_text('{"inode": 1}')
        heal(target)
        assert work.out.is_dir()


@pytest.mark.parametrize("journalled", [False, True])
def test_a_publish_that_another_process_has_just_finished_is_no_trouble(journalled, target, monkeypatch):
    """It has gone on between our look and our lock; where it then began anew and was killed, that stays."""
    control = control_directory(target)
    (control / "out").mkdir(parents=True)
    (control / "publishing").write_text('{"inode": 1}')
    take_lock = recovery.take_lock

    def take_lock_late(place):
        (control / "publishing").unlink()
        if journalled:
            with Journal(control, 0) as journal:
                journal.append(pieces=[("file", 0, 9, "hash", {})])
        return take_lock(place)

    monkeypatch.setattr(recovery, "take_lock", take_lock_late)
    heal(target)
    assert (control / "out").exists() == journalled
    assert entries(target.parent) == [".nemo.gemma4-moe"] * journalled
    monkeypatch.undo()
    clean(target)
    assert entries(target.parent) == []


def test_journals_that_contradict_each_other_can_be_removed(target):
    """Their own error says to do so: it must not be met again, nor the lock of the run that has failed."""

    def read_twice():
        with Transaction(target) as work:
            with Journal(work.control, 0) as journal:
                journal.append(pieces=[("file", 0, 9, "hash", {"source": "one"})])
                journal.append(pieces=[("file", 0, 9, "hash", {"source": "another"})])
            read_journals(work.control)

    with pytest.raises(SourceChangedError, match="other bytes than before") as caught:
        read_twice()
    assert "gemma4-moe clean" in str(caught.value.hint)
    assert clean(target) is not None
    assert entries(target.parent) == []


def test_trouble_in_clearing_away_does_not_hide_the_error(target, monkeypatch):
    def fail():
        monkeypatch.setattr(os, "rmdir", refusing(errno.EROFS))
        raise StorageError("the first error")

    with pytest.raises(StorageError, match="the first error") as caught, Transaction(target):
        fail()
    assert "can't remove the directory: Read-only file system" in caught.value.__notes__[0]
