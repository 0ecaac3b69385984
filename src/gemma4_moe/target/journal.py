"""The journal of a conversion: which pieces of the target are on the device, with their hashes and facts.

A killed run is resumed from it. There is one file for each rank, of lines that each carry their own checksum. A line
that a kill has torn ends the file: the lines after it are not believed, and are cut off before the next one is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from blake3 import blake3

from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import SourceChangedError
from gemma4_moe.target.pieces import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

_PATTERN = "journal-*"

#: Hexadecimal digits of a line's checksum.
_CHECKSUM = 16


@dataclass(slots=True)
class Journalled:
    """The content of a target's journals.

    Attributes:
        opening: The conversion: plan, options, source. None where no journal has a first line.
        pieces: Each piece of the target's files that is on the device, by its place.
    """

    opening: dict[str, Any] | None = None
    pieces: dict[tuple[str, int, int], Piece] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        """Add a piece, in the place of an earlier one that was made of the same source.

        Raises:
            SourceChangedError: The earlier one was made of other bytes of the source.
        """
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
        """Open the journal after its last good line; it is made if it does not exist.

        Raises:
            StorageError: The disk or its permissions refused.
        """
        self._path = control / f"journal-{rank:05}"
        with refusals("open the journal", self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._end = sum(len(line) for line in _good_lines(self._path.read_bytes()))
            os.ftruncate(self._descriptor, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def append(self, **record: Any) -> None:
        """Write one line and bring it to the device.

        Raises:
            StorageError: The disk or its permissions refused.
        """
        line = memoryview(_line(record))
        with refusals("write the journal", self._path):
            while line:
                count = os.pwrite(self._descriptor, line, self._end)
                self._end += count
                line = line[count:]
            os.fsync(self._descriptor)


def read_journals(control: Path) -> Journalled:
    """Return the content of all journals of a control directory.

    Raises:
        StorageError: The disk or its permissions refused.
        SourceChangedError: They give one piece two sources.
    """
    found = Journalled()
    for record in _records(control):
        found.opening = record.get("opening", found.opening)
        for row in record.get("pieces", ()):
            found.add(Piece(*row))
    return found


def can_go_on(control: Path) -> bool:
    """Return whether the journals of a control directory vouch for any part of the target.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    return any(record.get("pieces") for record in _records(control))


def as_rows(pieces: Iterable[Piece]) -> list[tuple[Any, ...]]:
    """Return pieces as a record holds them."""
    return [(*piece.place, piece.digest, piece.facts) for piece in pieces]


def journals(control: Path) -> list[Path]:
    """Return the journals of a control directory, in the order of ranks."""
    return sorted(control.glob(_PATTERN))


def _records(control: Path) -> Iterator[Mapping[str, Any]]:
    for path in journals(control):
        with refusals("read the journal", path):
            content = path.read_bytes()
        for line in _good_lines(content):
            yield json.loads(line[_CHECKSUM + 1 :])


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return blake3(text).hexdigest()[:_CHECKSUM].encode()


def _good_lines(content: bytes) -> Iterable[bytes]:
    """Yield the lines of a journal up to the first one that is torn."""
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not text.endswith(b"\n") or checksum != _checksum(text[:-1]):
            return
        yield line
