"""The journal of a conversion: which parts of the target are on the device, with their hashes.

A killed run goes on from there. There is one file for each rank, of lines that each carry their own checksum. A line
that a kill has torn ends the file: what comes after it is not believed, and is cut off before the next line is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from blake3 import blake3

from gemma4_moe.checkpoint.hashing import Chunk
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import SourceChangedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    #: For each chunk, how many finite values of each tensor have become infinite in it.
    Overflows = Mapping[Chunk, Mapping[str, int]]

_T = TypeVar("_T")

_PATTERN = "journal-*"

#: Hexadecimal digits of a line's checksum.
_CHECKSUM = 16


@dataclass(slots=True)
class Journalled:
    """What the journals of a target say.

    Attributes:
        opening: What the conversion is: plan, options, source. None where no journal has a first line.
        target: Hash of each chunk of the target's files that is on the device.
        source: Hash of each chunk of the source's tensors that was read.
        overflows: For chunks of `target`, how many finite values of each tensor have become infinite in it.
    """

    opening: dict[str, Any] | None = None
    target: dict[Chunk, str] = field(default_factory=dict)
    source: dict[Chunk, str] = field(default_factory=dict)
    overflows: dict[Chunk, Mapping[str, int]] = field(default_factory=dict)

    def take(self, record: Mapping[str, Any]) -> None:
        """Take one record in.

        Raises:
            SourceChangedError: It gives a chunk of the source another hash than an earlier one.
        """
        self.opening = record.get("opening", self.opening)
        for name, number, digest in record.get("target", ()):
            self.target[Chunk(name, number)] = digest
            self.overflows.pop(Chunk(name, number), None)  # the chunk was made once more
        for name, number, counts in record.get("overflows", ()):
            self.overflows[Chunk(name, number)] = counts
        for name, number, digest in record.get("source", ()):
            known = self.source.setdefault(Chunk(name, number), digest)
            if known != digest:
                raise SourceChangedError(
                    "the source gave other bytes than before",
                    tensor=name,
                    expected=f"chunk {number} with BLAKE3 {known}",
                    found=digest,
                    hint="let nothing write the source, remove what was made with `gemma4-moe clean`, and start again",
                )


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
    """Return what all journals of a control directory say.

    Raises:
        StorageError: The disk or its permissions refused.
        SourceChangedError: They give one chunk of the source two hashes.
    """
    found = Journalled()
    for record in _records(control):
        found.take(record)
    return found


def can_go_on(control: Path) -> bool:
    """Say whether the journals of a control directory vouch for any part of the target.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    return any(record.get("target") for record in _records(control))


def journals(control: Path) -> list[Path]:
    """Return the journals of a control directory, in the order of ranks."""
    return sorted(control.glob(_PATTERN))


def as_rows(facts: Mapping[Chunk, _T]) -> list[tuple[str, int, _T]]:
    """Return hashes, or other facts of chunks, as a record holds them."""
    return [(chunk.name, chunk.number, fact) for chunk, fact in facts.items()]


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
