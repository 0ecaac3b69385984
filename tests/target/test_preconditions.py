"""What may be replaced: a directory that a checkpoint accounts for to its last entry, and nothing else."""

import errno
import itertools
import os
from functools import partial
from pathlib import Path

import pytest

from gemma4_moe import convert
from gemma4_moe.errors import StorageError, UsageError
from gemma4_moe.target.preconditions import check_existing, check_place, check_target
from support.checkpoints import contents, write_checkpoint
from support.models import random_hf_state_dict


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict())


@pytest.fixture(params=["ours", "foreign"])
def old(request, source, tmp_path):
    """A directory that we wrote, with a manifest, or one that another tool wrote, with an index."""
    if request.param == "ours":
        convert(source, tmp_path / "old", max_shard_size=2000)
    else:
        write_checkpoint(tmp_path / "old", random_hf_state_dict(), files=3)
    return tmp_path / "old"


def refused(target, words, *, overwrite=True):
    before = contents(target)
    with pytest.raises(UsageError, match=words) as caught:
        check_existing(target, overwrite=overwrite)
    assert contents(target) == before
    assert caught.value.facts["file"] == str(target)
    return caught.value


def test_a_checkpoint_may_be_replaced_where_that_was_said(old):
    check_existing(old, overwrite=True)
    assert "--overwrite" in str(refused(old, "the target exists", overwrite=False))


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_and_an_empty_directory_may_be_filled(overwrite, tmp_path):
    check_existing(tmp_path / "new", overwrite=overwrite)
    (tmp_path / "new").mkdir()
    check_existing(tmp_path / "new", overwrite=overwrite)


def directory_of_mine(path):
    path.mkdir()
    (path / "mine").write_text("mine")


MAKE = [
    (lambda path: path.write_text("mine"), ["notes.txt", ".hidden", "optimizer.pt", "model.py", "trainer_state.json"]),
    (Path.mkdir, ["logs/", ".cache/", ".git/", "config.json.d/"]),
    (directory_of_mine, ["logs/", ".cache/", ".git/", "config.json.d/"]),
    (lambda path: path.symlink_to(path.parent.parent), ["linked"]),
    (os.mkfifo, ["pipe"]),
]


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in MAKE for name in names])
def test_what_no_checkpoint_accounts_for_is_named(make, name, old):
    make(old / name)
    assert name in refused(old, "no checkpoint accounts for").facts["found"]


def test_a_weight_file_that_the_index_does_not_name_is_told(old):
    (old / "stale.safetensors").write_bytes(next(old.glob("*.safetensors")).read_bytes())
    refused(
        old,
        "not a checkpoint that may be replaced: a safetensors file that the (index does not name|others do not count)",
    )


def test_a_link_to_a_checkpoint_is_not_a_checkpoint(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    assert "a link" in str(refused(tmp_path / "link", "is not a directory"))
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(tmp_path / "dangling", "is not a directory")


@pytest.mark.parametrize("empty", [False, True])
def test_a_mount_point_is_refused(empty, old, tmp_path, monkeypatch):
    target = old
    if empty:
        target = tmp_path / "empty"
        target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    assert "name a directory inside it" in str(refused(target, "mount point"))


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_the_working_directory_and_what_is_above_it_stay(below, old, monkeypatch):
    (old / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(old / below)
    refused(old, "the working directory lies in the target")
    refused(Path(os.path.relpath(old)), "the working directory lies in the target")


@pytest.mark.parametrize("name", [".", "{}"])
def test_an_empty_working_directory_is_not_exchanged_under_its_users_feet(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(Path(name.format(tmp_path)), "the working directory lies in the target", overwrite=False)


@pytest.mark.parametrize("look", range(3))
def test_a_target_that_may_not_be_looked_at_is_told(look, old, monkeypatch):
    looks, iterdir = itertools.count(), Path.iterdir

    def refuse_one(path):
        if next(looks) == look:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse_one)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        check_existing(old, overwrite=True)
    assert caught.value.facts["file"] == str(old)
    assert next(looks) == look + 1


def test_what_is_no_checkpoint_is_told_why(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("mine")
    refused(tmp_path / "home", "not a checkpoint that may be replaced: ")


def test_the_source_is_never_the_target_even_with_overwrite(source, tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path)
    for target, words in (
        (source, "is the source"),
        (tmp_path / "alias/hf", "is the source"),
        (source / "inside", "lies inside the source"),
        (tmp_path / "alias/hf/inside", "lies inside the source"),
        (tmp_path, "holds the source"),
    ):
        for check in (check_place, partial(check_target, overwrite=True)):
            with pytest.raises(UsageError, match=words):
                check(target, source)
