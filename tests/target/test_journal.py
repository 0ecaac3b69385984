"""The journal: what was appended is read back; what was torn is not believed, nor anything behind it."""

import errno
import os

import pytest

from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.target.journal import Journal, as_rows, journals, read_journals, recorded_command
from gemma4_moe.target.pieces import Piece
from support.direct_io import refusing

OPENING = {"plan": "p", "options": {"dtype": "keep"}}


def piece(number):
    return Piece("f", 100 * number, 100 * number + 100, f"hash{number}", {"source": f"s{number}"})


def found_in(control):
    return list(read_journals(control).pieces.values())


def write(control, count, rank=0):
    with Journal(control, rank) as journal:
        journal.append(opening=OPENING)
        for number in range(count):
            journal.append(pieces=as_rows([piece(number)]))
    return journals(control)[-1]


def test_what_was_appended_is_read_by_all_ranks(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 3, rank=1)
    found = read_journals(tmp_path)
    assert found.opening == OPENING
    assert found.pieces == {("f", 0, 100): piece(0), ("f", 100, 200): piece(1), ("f", 200, 300): piece(2)}
    assert [piece.facts for piece in found.pieces.values()] == [{"source": f"s{number}"} for number in range(3)]
    assert read_journals(tmp_path / "nowhere").opening is None


def test_only_pieces_are_something_to_go_on_from(tmp_path):
    write(tmp_path, 0)
    assert recorded_command(tmp_path) is None
    write(tmp_path, 1, rank=3)
    assert recorded_command(tmp_path) is not None


def test_a_tail_torn_anywhere_is_ignored_and_cut_off(tmp_path):
    raw = write(tmp_path, 2).read_bytes()
    last = raw.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(raw)):
        path = journals(tmp_path)[0]
        path.write_bytes(raw[:size])
        assert found_in(tmp_path) == [piece(0)], size
    with Journal(tmp_path, 0) as journal:
        journal.append(pieces=as_rows([piece(7)]))
    assert found_in(tmp_path) == [piece(0), piece(7)]
    assert path.read_bytes().startswith(raw[:last])
    assert path.read_bytes().endswith(b'{"pieces":[["f",700,800,"hash7",{"source":"s7"}]]}\n')


def test_a_changed_byte_ends_what_is_believed(tmp_path):
    path = write(tmp_path, 3)
    raw = bytearray(path.read_bytes())
    lines = raw.splitlines(keepends=True)
    for offset in range(len(lines[0]) + len(lines[1]), len(lines[0]) + len(lines[1]) + len(lines[2])):
        changed = raw.copy()
        changed[offset] ^= 1
        path.write_bytes(changed)
        assert found_in(tmp_path) == [piece(0)], offset


def test_a_record_is_on_the_device_before_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    path = write(tmp_path, 1)
    assert synced == [len(path.read_bytes().splitlines(keepends=True)[0]), path.stat().st_size]


def test_a_journal_that_the_disk_refuses_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", refusing(errno.ENOSPC))
    with Journal(tmp_path, 0) as journal, pytest.raises(StorageError, match="can't write the journal: No space"):
        journal.append(opening=OPENING)


def test_a_piece_that_was_made_once_more_has_the_facts_of_its_last_time(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.append(pieces=[("f", 0, 9, "h", {"overflowed": 3}), ("f", 9, 12, "i", {"overflowed": 5})])
        journal.append(pieces=[("f", 0, 9, "other", {"overflowed": 4})])
    assert [(piece.digest, piece.facts["overflowed"]) for piece in found_in(tmp_path)] == [("other", 4), ("i", 5)]


def test_two_sources_of_one_piece_are_told(tmp_path):
    with Journal(tmp_path, 0) as journal:
        for source in ("one", "one", "other"):
            journal.append(pieces=[("f", 4, 9, "h", {"tensor": "t", "source": source})])
    with pytest.raises(SourceChangedError, match="other bytes than before") as caught:
        read_journals(tmp_path)
    assert caught.value.facts == {"tensor": "t", "expected": "BLAKE3 one for (4, 9) of f", "found": "BLAKE3 other"}
