import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest

from gemma4_moe.checkpoint.storage import open_regular, read_whole, refusals, temporary_directory
from gemma4_moe.errors import CheckpointFormatError, StorageError
from support.descriptors import open_descriptors
from support.direct_io import refusing


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()  # noqa: PTH109
        os.chdir(path.parent)  # the name of a socket is short
        listener.bind(path.name)
        os.chdir(here)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "a directory"),
        (_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, make, kind):
    make(tmp_path / "f")
    with pytest.raises(CheckpointFormatError, match="not a regular file") as caught:
        read_whole(tmp_path / "f", 10)
    assert caught.value.facts["found"] == kind


@pytest.mark.timeout(20)
def test_a_pipe_that_takes_the_files_place_just_then_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "f")
    monkeypatch.setattr("gemma4_moe.checkpoint.storage.regular_status", lambda _: None)
    before = open_descriptors()
    with pytest.raises(CheckpointFormatError, match="not a regular file"):
        open_regular(tmp_path / "f")
    assert open_descriptors() == before


def test_links_to_files_are_followed_and_those_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_whole(tmp_path / "link", 3) == b"abc"
    for name, found in (("dangling", "a link that leads nowhere"), ("absent", "nothing")):
        with pytest.raises(CheckpointFormatError, match="missing") as caught:
            read_whole(tmp_path / name, 3)
        assert caught.value.facts["found"] == found
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match="can't look at the file"):
        read_whole(tmp_path / "loop", 3)


def test_a_file_is_read_to_its_limit_and_not_beyond(tmp_path):
    (tmp_path / "f").write_bytes(b"abcd")
    assert read_whole(tmp_path / "f", 4) == b"abcd"
    with pytest.raises(CheckpointFormatError, match="far larger") as caught:
        read_whole(tmp_path / "f", 3)
    assert caught.value.facts == {"file": str(tmp_path / "f"), "expected": "at most 3 bytes", "found": "4 bytes"}


@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_file_that_may_not_be_read_is_a_storage_error(tmp_path, monkeypatch, call):
    (tmp_path / "f").write_bytes(b"abc")
    with monkeypatch.context() as broken:
        broken.setattr(os, call, refusing(errno.EACCES))
        with pytest.raises(StorageError, match="Permission denied"):
            read_whole(tmp_path / "f", 3)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EBADMSG, "check the disk"),
    ],
)
def test_what_the_disk_says_becomes_a_sentence_a_file_and_a_next_step(code, hint):
    with pytest.raises(StorageError) as caught, refusals("write the file", "x"):
        raise OSError(code, os.strerror(code))
    assert caught.value.problem == f"can't write the file: {os.strerror(code)}"
    assert caught.value.facts == {"file": "x"}
    assert hint in caught.value.hint
    assert caught.value.exit_status == 5


def test_a_temporary_directory_needs_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_directory("some-") as made:
        assert os.listdir(tmp_path) == [os.path.basename(made)]  # noqa: PTH119, PTH208
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="temporary directory: No such file") as caught:
        temporary_directory("some-")
    assert caught.value.facts["file"].startswith(str(tmp_path / "gone"))
    assert "TMPDIR" in caught.value.hint


def test_a_refusal_inside_a_refusal_keeps_its_own_sentence():
    with pytest.raises(StorageError, match=r"^can't read: No space"), refusals("write", "x"), refusals("read", "y"):
        raise OSError(errno.ENOSPC, "No space")
