"""The lock of a target: one owner, who is named; a killed one's is free, another host's counts until it is broken."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gemma4_moe.errors import StorageError, TargetBusyError
from gemma4_moe.target import locking
from gemma4_moe.target.locking import Lock
from support.direct_io import refusing

HOLDER = """
    import sys
    from pathlib import Path
    from gemma4_moe.target.locking import Lock
    Lock(Path(sys.argv[1]))
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "owner"


@pytest.fixture
def holder(path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def sign(path, host):
    path.write_text(json.dumps({"pid": 4_000_000, "host": host, "since": 1e9}))


def test_a_living_owner_is_named_and_not_to_be_broken(path, holder):
    for break_lock in (False, True):
        with pytest.raises(TargetBusyError) as caught:
            Lock(path, break_lock=break_lock)
        assert f"process {holder.pid} on {os.uname().nodename}, since " in caught.value.facts["found"]
        assert "wait until it has ended" in str(caught.value)


def test_a_killed_owner_leaves_the_lock_free(path, holder):
    holder.kill()
    holder.wait()
    lock = Lock(path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    assert path.read_text() == ""
    Lock(path).release()


def test_another_hosts_owner_is_named_and_counts_until_it_is_broken(path):
    sign(path, "far-away")
    for _ in range(2):
        with pytest.raises(TargetBusyError) as caught:
            Lock(path)
        assert caught.value.facts["found"] == "process 4000000 on far-away, since 2001-09-09 01:46:40 UTC"
        assert "if that process is gone, give --break-lock" in str(caught.value)
    Lock(path, break_lock=True).release()
    Lock(path).release()


def test_another_hosts_owner_that_flock_shows_to_be_alive_can_be_broken(path, holder):
    """A host that was cut off keeps its lock on some filesystems. It notices when it is back."""
    sign(path, "far-away")
    with pytest.raises(TargetBusyError, match="another process is writing"):
        Lock(path)
    lock = Lock(path, break_lock=True)
    lock.confirm()
    assert holder.poll() is None
    lock.release()


def test_whoever_was_broken_in_on_notices(path):
    first = Lock(path)
    first.confirm()
    sign(path, "far-away")
    path.unlink()
    second = Lock(path)
    with pytest.raises(TargetBusyError, match="has broken this lock") as caught:
        first.confirm()
    assert str(os.getpid()) in caught.value.facts["found"]
    second.confirm()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_filesystem_the_name_decides(code, path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    first = Lock(path)
    with pytest.raises(TargetBusyError, match="another process is writing") as caught:
        Lock(path)
    assert f"process {os.getpid()} on {os.uname().nodename}, since " in caught.value.facts["found"]
    assert "--break-lock" in str(caught.value)
    second = Lock(path, break_lock=True)
    with pytest.raises(TargetBusyError, match="has broken this lock"):
        first.confirm()
    second.release()
    Lock(path).release()


def test_of_two_that_take_one_lock_at_once_the_first_to_sign_stops(path, monkeypatch):
    """It can happen where the filesystem has no locks: each looks for a name before the other has signed."""
    monkeypatch.setattr(locking, "_try_lock", lambda *_: True)
    monkeypatch.setattr(locking, "_read_owner", lambda *_: None)
    first, second = Lock(path), Lock(path)
    with pytest.raises(TargetBusyError, match="has broken this lock"):
        first.confirm()
    second.confirm()


@pytest.mark.parametrize(
    ("owner", "call", "code", "words"),
    [
        (fcntl, "flock", errno.EIO, "can't lock the target: Input/output error"),
        (Path, "stat", errno.EACCES, "can't look at the lock: Permission denied"),
        (os, "pwrite", errno.EIO, "can't sign the lock: Input/output error"),
    ],
)
def test_another_refusal_is_the_disks_and_leaves_the_lock_free(owner, call, code, words, path, monkeypatch):
    with monkeypatch.context() as refusing_one:
        refusing_one.setattr(owner, call, refusing(code))
        with pytest.raises(StorageError, match=words):
            Lock(path)
    Lock(path).release()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_no_room_for_a_name_and_locks_all_the_same(code, path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", refusing(code))
        lock = Lock(path)
        with pytest.raises(TargetBusyError, match="another process is writing"):
            Lock(path)
        lock.release()
    Lock(path).release()


def test_a_name_that_the_disk_keeps_does_not_keep_the_lock(path, monkeypatch):
    lock = Lock(path)
    with monkeypatch.context() as refusing_one:
        refusing_one.setattr(os, "ftruncate", refusing(errno.EIO))
        with pytest.raises(StorageError, match="can't release the lock"):
            lock.release()
    Lock(path).release()


@pytest.mark.parametrize("name", ["", "{", "[]", '{"pid": "x", "host": 3, "since": null}'])
def test_a_name_that_makes_no_sense_is_no_owner(name, path):
    path.write_text(name)
    Lock(path).release()


def test_a_lock_whose_file_vanished_meanwhile_is_taken_anew(path, monkeypatch):
    whole, calls = fcntl.flock, []

    def remove_once(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        whole(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    Lock(path).confirm()
    assert len(calls) == 2
