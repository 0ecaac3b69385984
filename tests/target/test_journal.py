"""The journal: what was appended is read back; what was torn is not believed, nor anything behind it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from gemma4_moe.checkpoint.hashing import Chunk
from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.target.journal import Journal, as_rows, journals, read_journals

if TYPE_CHECKING:
    from pathlib import Path

OPENING = {"plan": "p", "options": {"dtype": "keep"}}


def write(control: Path, count: int, rank: int = 0) -> Path:
    with Journal(control, rank) as journal:
        journal.append(opening=OPENING)
        for number in range(count):
            journal.append(target=as_rows({Chunk("f", number): f"hash{number}"}), source=[("t", number, f"s{number}")])
    return journals(control)[-1]


def test_what_was_appended_is_read_by_all_ranks(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 3, rank=1)
    found = read_journals(tmp_path)
    assert found.opening == OPENING
    assert found.target == {("f", 0): "hash0", ("f", 1): "hash1", ("f", 2): "hash2"}
    assert found.source == {("t", 0): "s0", ("t", 1): "s1", ("t", 2): "s2"}
    assert read_journals(tmp_path / "nowhere").opening is None


def test_a_tail_torn_anywhere_is_ignored_and_cut_off(tmp_path: Path) -> None:
    raw = write(tmp_path, 2).read_bytes()
    last = raw.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(raw)):
        path = journals(tmp_path)[0]
        path.write_bytes(raw[:size])
        assert read_journals(tmp_path).target == {("f", 0): "hash0"}, size
    with Journal(tmp_path, 0) as journal:
        journal.append(target=[("f", 7, "later")])
    assert read_journals(tmp_path).target == {("f", 0): "hash0", ("f", 7): "later"}
    assert path.read_bytes().startswith(raw[:last])
    assert path.read_bytes().endswith(b'[["f",7,"later"]]}\n')


def test_a_changed_byte_ends_what_is_believed(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    raw = bytearray(path.read_bytes())
    lines = raw.splitlines(keepends=True)
    for offset in range(len(lines[0]) + len(lines[1]), len(lines[0]) + len(lines[1]) + len(lines[2])):
        changed = raw.copy()
        changed[offset] ^= 1
        path.write_bytes(changed)
        assert read_journals(tmp_path).target == {("f", 0): "hash0"}, offset


def test_a_record_is_on_the_device_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    path = write(tmp_path, 1)
    assert synced == [len(path.read_bytes().splitlines(keepends=True)[0]), path.stat().st_size]


def test_a_journal_that_the_disk_refuses_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with Journal(tmp_path, 0) as journal, pytest.raises(StorageError, match="can't write the journal: No space"):
        journal.append(opening=OPENING)


def test_a_chunk_that_was_made_once_more_has_the_count_of_its_last_time(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        journal.append(target=[("f", 0, "h"), ("f", 1, "i")], overflows=[("f", 0, {"t": 3}), ("f", 1, {"t": 5})])
        journal.append(target=[("f", 0, "other")])
        assert read_journals(tmp_path).overflows == {("f", 1): {"t": 5}}
        journal.append(target=[("f", 0, "h")], overflows=[("f", 0, {"t": 4})])
    assert read_journals(tmp_path).overflows == {("f", 0): {"t": 4}, ("f", 1): {"t": 5}}


def test_two_hashes_of_one_piece_of_the_source_are_told(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        journal.append(source=[("t", 4, "one")])
        journal.append(source=[("t", 4, "one")])
        journal.append(source=[("t", 4, "other")])
    with pytest.raises(SourceChangedError, match="other bytes than before") as caught:
        read_journals(tmp_path)
    assert caught.value.facts == {"tensor": "t", "expected": "chunk 4 with BLAKE3 one", "found": "other"}
