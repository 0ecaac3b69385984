"""The lock of a target: one owner, who is named; a dead one's is free, another host's counts while it gives signs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma4_moe.errors import StorageError, TargetBusyError
from gemma4_moe.target import locking
from gemma4_moe.target.locking import Lock

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLDER = """
    import sys
    from pathlib import Path
    from gemma4_moe.target.locking import Lock
    Lock(Path(sys.argv[1]))
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "owner"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def sign(path: Path, host: str, pid: int = 4_000_000, age: float = 0.0) -> None:
    path.write_text(json.dumps({"pid": pid, "host": host, "since": time.time() - age}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_living_owner_is_named_and_not_to_be_broken(path: Path, holder: subprocess.Popen[bytes]) -> None:
    for break_lock in (False, True):
        with pytest.raises(TargetBusyError) as caught:
            Lock(path, break_lock=break_lock)
        assert f"process {holder.pid} on {os.uname().nodename}, since " in caught.value.facts["found"]
        assert "wait until it has ended" in str(caught.value)


def test_a_killed_owner_leaves_the_lock_free(path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    lock = Lock(path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()
    assert path.read_text() == ""
    Lock(path).release()


def test_another_host_counts_while_it_gives_signs(path: Path) -> None:
    sign(path, "far-away", age=30)
    with pytest.raises(TargetBusyError) as caught:
        Lock(path)
    assert caught.value.facts["found"] == "process 4000000 on far-away, since 30 s, last sign 30 s ago"
    assert "--break-lock" in str(caught.value)
    Lock(path, break_lock=True).release()


def test_another_host_without_a_sign_is_stale(path: Path) -> None:
    sign(path, "far-away", age=locking.STALE_AFTER + 5)
    Lock(path).release()


def test_whoever_was_broken_in_on_notices(path: Path) -> None:
    first = Lock(path)
    first.confirm()
    sign(path, "far-away")
    path.unlink()
    second = Lock(path)
    with pytest.raises(TargetBusyError, match="has broken this lock") as caught:
        first.confirm()
    assert str(os.getpid()) in caught.value.facts["found"]
    second.confirm()


def test_confirming_is_a_sign_of_life(path: Path) -> None:
    lock = Lock(path)
    os.utime(path, (1, 1))
    lock.confirm()
    assert time.time() - path.stat().st_mtime < 60


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_filesystem_the_name_decides(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    Lock(path).release()
    sign(path, os.uname().nodename, pid=4_000_000)
    Lock(path).release()
    sign(path, os.uname().nodename, pid=os.getppid())
    with pytest.raises(TargetBusyError):
        Lock(path)


def test_a_process_of_another_user_lives_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(_: int, number: int) -> None:
        assert number == 0, "nothing is sent"
        raise PermissionError

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(os, "kill", not_permitted)
    sign(path, os.uname().nodename)
    for break_lock in (False, True):
        with pytest.raises(TargetBusyError):
            Lock(path, break_lock=break_lock)


def test_another_refusal_is_the_disks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="can't lock the target"):
        Lock(path)


def test_a_lock_that_may_not_be_looked_at_is_the_disks_refusal_and_stays_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "stat", refuse)
        with pytest.raises(StorageError, match="can't look at the lock: Permission denied"):
            Lock(path)
    Lock(path).release()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_has_no_room_for_a_name_and_locks_all_the_same(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as refusing:
        refusing.setattr(os, "pwrite", refuse)
        if code == errno.EIO:
            with pytest.raises(StorageError, match="can't sign the lock"):
                Lock(path)
        else:
            lock = Lock(path)
            with pytest.raises(TargetBusyError, match="another process is writing"):
                Lock(path)
            lock.release()
    Lock(path).release()


def test_a_name_that_the_disk_keeps_does_not_keep_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lock = Lock(path)
    with monkeypatch.context() as refusing:
        refusing.setattr(os, "ftruncate", refuse)
        with pytest.raises(StorageError, match="can't release the lock"):
            lock.release()
    Lock(path).release()


@pytest.mark.parametrize("name", ["", "{", "[]", '{"pid": "x", "host": 3, "since": null}'])
def test_a_name_that_makes_no_sense_is_no_owner(name: str, path: Path) -> None:
    path.write_text(name)
    Lock(path).release()


def test_a_lock_whose_file_vanished_meanwhile_is_taken_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = fcntl.flock, []

    def remove_once(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        whole(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    Lock(path).confirm()
    assert len(calls) == 2
