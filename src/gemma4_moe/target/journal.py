"""The journal of a conversion: which pieces of the target are on the device, with their hashes and facts.

A killed run is resumed from it. There is one file for each rank, of lines that each carry their own checksum. A line
that a kill has torn ends the file: the lines after it are not believed, and are cut off before the next one is written.

A ledger holds the pieces that were written until their bytes are on the device. Only then do they enter the journal.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from blake3 import blake3

from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import SourceChangedError
from gemma4_moe.target.pieces import Count, Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.target.writers import PageWriter

#: Between two entries into the journal: at most so many bytes, and about so many seconds.
FLUSH_BYTES = 2**30
FLUSH_SECONDS = 10.0

#: Hexadecimal digits of a line's checksum.
_CHECKSUM = 16


@dataclass(slots=True)
class Journalled:
    """The content of a target's journals: the conversion that they open with, and the pieces on the device by place.

    `command` is the command line that resumes the conversion as it was begun.
    """

    opening: dict[str, Any] | None = None
    command: str | None = None
    pieces: dict[tuple[str, int, int], Piece] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Add a piece, or put it in the place of an earlier one, which must be made of the same bytes of the source."""
        known = self.pieces.get(piece.place)
        if known is not None and known.facts.get("source") != piece.facts.get("source"):
            raise SourceChangedError(
                "the source gave other bytes than before",
                tensor=piece.facts.get("tensor"),
                expected=f"BLAKE3 {known.facts.get('source')} for ({piece.start}, {piece.end}) of {piece.file}",
                found=f"BLAKE3 {piece.facts.get('source')}",
                hint="let nothing write the source, delete this run with `gemma4-moe clean`, and start again",
            )
        self.pieces[piece.place] = piece


class Journal:
    """One rank's journal, open for writing. Use it as a context manager."""

    def __init__(self, control: Path, rank: int) -> None:
        """Open the journal after its last good line; it is made if it does not exist."""
        self._path = control / f"journal-{rank:05}"
        with refusals("open the journal", self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._end = sum(map(len, _good_lines(self._path.read_bytes())))
            os.ftruncate(self._descriptor, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, **record: Any) -> None:
        """Write one line and bring it to the device."""
        text = json.dumps(record, separators=(",", ":")).encode()
        line = memoryview(_checksum(text) + b" " + text + b"\n")
        with refusals("write the journal", self._path):
            while line:
                count = os.pwrite(self._descriptor, line, self._end)
                self._end += count
                line = line[count:]
            os.fsync(self._descriptor)


class Ledger:
    """Brings pieces that were written to the device and journals them, every now and then. Used by one thread."""

    def __init__(self, journal: Journal, known: Journalled, check: Callable[[], None], count: Count) -> None:
        """Begin with nothing written. `check` is called before each entry, and raises if the run must not go on."""
        self._journal, self._known, self._check, self._count = journal, known, check, count
        self._begin()

    def _begin(self) -> None:
        self._pieces: list[tuple[PageWriter, Piece]] = []
        self._written, self._flushed = 0, time.monotonic()

    def wrote(self, file: PageWriter, piece: Piece) -> None:
        """Take note of a piece that was written. Raises what `Journalled.add` and `check` raise."""
        self._pieces.append((file, piece))
        self._written += piece.size
        if self._written >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
        self._count(piece.size)

    def flush(self) -> None:
        """Bring all pieces that were written to the device, then journal them. Raises what `wrote` raises."""
        for file in dict.fromkeys(file for file, _ in self._pieces):
            file.sync()
        self._check()
        for _, piece in self._pieces:
            self._known.add(piece)
        if self._pieces:
            self._journal.append(pieces=as_rows(piece for _, piece in self._pieces))
        self._begin()


def read_journals(control: Path) -> Journalled:
    """Return the content of all journals of a control directory. Raises what `Journalled.add` raises."""
    found = Journalled()
    for record in _records(control):
        found.opening = record.get("opening", found.opening)
        found.command = found.command or record.get("command")
        for row in record.get("pieces", ()):
            found.add(Piece(*row))
    return found


def recorded_command(control: Path) -> str | None:
    """Return the command line that resumes a run, or None if its journals vouch for no part of the target."""
    records = list(_records(control))
    if not any(record.get("pieces") for record in records):
        return None
    return str(next(filter(None, (record.get("command") for record in records)), "gemma4-moe convert SRC DST --resume"))


def as_rows(pieces: Iterable[Piece]) -> list[tuple[Any, ...]]:
    """Return pieces as a record holds them."""
    return [(*piece.place, piece.digest, piece.facts) for piece in pieces]


def journals(control: Path) -> list[Path]:
    """Return the journals of a control directory, in the order of ranks."""
    return sorted(control.glob("journal-*"))


def _records(control: Path) -> Iterator[Mapping[str, Any]]:
    for path in journals(control):
        with refusals("read the journal", path):
            content = path.read_bytes()
        for line in _good_lines(content):
            yield json.loads(line[_CHECKSUM + 1 :])


def _good_lines(content: bytes) -> Iterator[bytes]:
    """Yield the lines of a journal up to the first one that is torn."""
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not text.endswith(b"\n") or checksum != _checksum(text[:-1]):
            return
        yield line


def _checksum(text: bytes) -> bytes:
    return blake3(text).hexdigest()[:_CHECKSUM].encode()
