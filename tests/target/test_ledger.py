"""The ledger: a piece enters the journal after its bytes are on the device, and only if the run may go on."""

from typing import Any

import pytest

from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.target import journal
from gemma4_moe.target.journal import Journalled, Ledger
from gemma4_moe.target.pieces import Count, Piece


class Disk:
    """Stands for a file's writer, the journal and the check, and notes the order in which they are called."""

    def __init__(self):
        self.calls: list[Any] = []
        self.refusals: dict[str, Exception] = {}

    def note(self, name, *facts):
        self.calls.append((name, *facts))
        if name in self.refusals:
            raise self.refusals[name]

    def sync(self):
        self.note("sync")

    def append(self, **record):
        self.note("append", record)

    def check(self):
        self.note("check")


def piece(start, end, **facts):
    return Piece("f", start, end, f"t{start}", facts)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def told():
    return []


@pytest.fixture
def book(disk, told, monkeypatch):
    """A ledger in which a piece of (700, 760) is known from before."""
    monkeypatch.setattr(journal, "FLUSH_BYTES", 100)
    known = Journalled()
    known.add(piece(700, 760, tensor="x", source="before"))
    return Ledger(disk, known, disk.check, Count([1000], lambda *seen: told.append(seen)))


def test_a_source_that_was_read_before_must_give_the_same(book, disk):
    book.wrote(disk, piece(700, 760, tensor="x", source="now"))
    with pytest.raises(SourceChangedError, match="other bytes than before"):
        book.flush()
    assert disk.calls == [("sync",), ("check",)]


def test_bytes_come_to_the_device_before_their_piece_is_journalled(book, disk):
    book.wrote(disk, piece(0, 60))
    assert disk.calls == []
    book.wrote(disk, piece(60, 120, source="s", overflowed=3))
    rows = [("f", 0, 60, "t0", {}), ("f", 60, 120, "t60", {"source": "s", "overflowed": 3})]
    assert disk.calls == [("sync",), ("check",), ("append", {"pieces": rows})]
    book.flush()
    assert disk.calls[3:] == [("check",)], "nothing new is nothing to journal"


def test_time_passes_too(book, disk, monkeypatch):
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    book.wrote(disk, piece(0, 1))
    assert [call[0] for call in disk.calls] == ["sync", "check", "append"]


@pytest.mark.parametrize(
    ("what", "error"), [("sync", StorageError("no fsync")), ("check", SourceChangedError("another source"))]
)
def test_after_a_refusal_nothing_is_journalled(what, error, book, disk):
    disk.refusals[what] = error
    for number in range(2):
        with pytest.raises(type(error)):
            book.wrote(disk, piece(100 * number, 100 * number + 100))
    assert "append" not in [call[0] for call in disk.calls]


def test_progress_counts_what_is_written(book, disk, told):
    book.wrote(disk, piece(0, 40))
    book.wrote(disk, piece(40, 90))
    assert told == [(40, 1000), (90, 1000)]
    Count([90], None)(3)
