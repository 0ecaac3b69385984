"""The ledger: a hash enters the journal after its bytes are on the device, and only if the run may go on."""

from __future__ import annotations

from typing import Any

import pytest

from gemma4_moe.checkpoint.hashing import Chunk
from gemma4_moe.errors import SourceChangedError, StorageError
from gemma4_moe.target import ledger
from gemma4_moe.target.journal import Journalled
from gemma4_moe.target.ledger import Ledger


class Disk:
    """Stands for a file's writer, the journal and the check, and notes the order in which they are called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.refusals: dict[str, Exception] = {}

    def note(self, name: str, *facts: Any) -> None:
        self.calls.append((name, *facts))
        if name in self.refusals:
            raise self.refusals[name]

    def sync(self) -> None:
        self.note("sync")

    def append(self, **record: Any) -> None:
        self.note("append", record)

    def check(self) -> None:
        self.note("check")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def book(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(ledger, "FLUSH_BYTES", 100)
    return Ledger(disk, Journalled(), disk.check, 1000, None)  # type: ignore[arg-type]


def test_bytes_come_to_the_device_before_their_hash_is_journalled(book: Ledger, disk: Disk) -> None:
    book.read({Chunk("t", 0): "s0"})
    book.wrote(disk, 60, {})  # type: ignore[arg-type]
    assert disk.calls == []
    book.wrote(disk, 60, {Chunk("f", 0): "t0"})  # type: ignore[arg-type]
    record = {"target": [("f", 0, "t0")], "source": [("t", 0, "s0")]}
    assert disk.calls == [("sync",), ("check",), ("append", record)]
    book.flush()
    assert disk.calls[3:] == [("check",)], "nothing new is nothing to journal"


def test_what_overflowed_is_journalled_once_with_its_chunk(book: Ledger, disk: Disk) -> None:
    book.wrote(disk, 100, {Chunk("f", 0): "t0"}, {Chunk("f", 0): {"t": 3}})  # type: ignore[arg-type]
    book.wrote(disk, 100, {Chunk("f", 1): "t1"})  # type: ignore[arg-type]
    records = [call[1] for call in disk.calls if call[0] == "append"]
    assert records == [
        {"target": [("f", 0, "t0")], "source": [], "overflows": [("f", 0, {"t": 3})]},
        {"target": [("f", 1, "t1")], "source": []},
    ]


def test_time_passes_too(book: Ledger, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FLUSH_SECONDS", 0.0)
    book.wrote(disk, 1, {Chunk("f", 0): "t0"})  # type: ignore[arg-type]
    assert [call[0] for call in disk.calls] == ["sync", "check", "append"]


@pytest.mark.parametrize(
    ("what", "error"), [("sync", StorageError("no fsync")), ("check", SourceChangedError("another source"))]
)
def test_after_a_refusal_nothing_is_journalled(what: str, error: Exception, book: Ledger, disk: Disk) -> None:
    disk.refusals[what] = error
    book.read({Chunk("t", 0): "s0"})
    for _ in range(2):
        with pytest.raises(type(error)):
            book.wrote(disk, 100, {Chunk("f", 0): "t0"})  # type: ignore[arg-type]
    assert "append" not in [call[0] for call in disk.calls]


def test_a_source_that_was_read_before_must_give_the_same(disk: Disk) -> None:
    known = Journalled(source={Chunk("t", 0): "before"})
    book = Ledger(disk, known, disk.check, 1000, None)  # type: ignore[arg-type]
    book.read({Chunk("t", 0): "now"})
    with pytest.raises(SourceChangedError, match="other bytes than before"):
        book.flush()
    assert disk.calls == [("check",)]


def test_progress_counts_what_is_written(disk: Disk) -> None:
    told: list[tuple[int, int]] = []
    book = Ledger(disk, Journalled(), disk.check, 90, lambda done, total: told.append((done, total)))  # type: ignore[arg-type]
    book.wrote(disk, 0, {})  # type: ignore[arg-type]
    book.wrote(disk, 40, {})  # type: ignore[arg-type]
    book.wrote(disk, 50, {})  # type: ignore[arg-type]
    assert told == [(40, 90), (90, 90)]
