"""`gemma4_moe.json`: how a directory of ours came to be, and the hashes of pieces that its files can be checked by.

It holds nothing that changes from run to run, no time and no path, so that equal conversions give equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.index import is_bare_name
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME, is_of_macos
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.checkpoint.values import is_document, value_notes
from gemma4_moe.errors import CheckpointFormatError
from gemma4_moe.sizes import format_size
from gemma4_moe.target.pieces import Count, Piece, gaps, wrong_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.sizes import Progress

#: Raised when a reader of the old form would misunderstand the new one.
FORMAT = 2

#: The longest manifest that is read, in bytes. The real model's has about 0.5 MB.
LONGEST_MANIFEST = 64 * 2**20


def described_files(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Return the manifest's entry of each file: its bytes, and its pieces in order, which cover it."""
    files: dict[str, Any] = {}
    for piece in sorted(pieces, key=lambda piece: piece.place):
        said = files.setdefault(piece.file, {"bytes": 0, "pieces": []})
        said["bytes"] = piece.end
        said["pieces"].append([piece.start, piece.end, piece.digest])
    return files


def pieces_of(files: Mapping[str, Any]) -> list[Piece]:
    """Return the pieces of the files that a manifest describes."""
    return [Piece(name, *row) for name, said in sorted(files.items()) for row in said["pieces"]]


def encode_manifest(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory that we wrote; an error if there is none, or one of another form."""
    path = directory / MANIFEST_NAME
    with refusals("look at the directory", directory):
        if directory.is_dir() and not path.exists():
            raise CheckpointFormatError(
                "the directory has no manifest: gemma4-moe did not write it",
                file=directory,
                expected=MANIFEST_NAME,
                hint="compare it with its source: gemma4-moe verify SRC DST",
            )
    raw = read_whole(path, LONGEST_MANIFEST)
    try:
        document = json.loads(raw)
        found = f"format {document['format']!r}"
        known = (
            document["format"] == FORMAT
            and isinstance(document["options"], dict)
            and isinstance(document.get("source", {"files": {}})["files"], dict)
            and all(is_bare_name(name) and _is_covered(file) for name, file in document["files"].items())
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(path, str(error)) from error
    if not known:
        raise _foreign(path, found)
    return dict(document)


def _is_covered(file: Any) -> bool:
    """Return whether a manifest gives a file a size, and pieces that cover it."""
    size, rows = file["bytes"], file["pieces"]
    known = (type(a) is type(b) is int and a <= b and isinstance(digest, str) for a, b, digest in rows)
    return type(size) is int and bool(rows) and all(known) and not gaps([(a, b) for a, b, _ in rows], size)


def _foreign(path: Path, found: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        "not a manifest that this version reads",
        file=path,
        expected=f"format {FORMAT}, with pieces that cover each file",
        found=found,
        hint="check the directory against its source: gemma4-moe verify SRC DST",
    )


@dataclass(frozen=True, slots=True, repr=False)
class Recheck:
    """The result of a check against a manifest.

    Attributes:
        directory: The directory.
        files: Number of files that the manifest names.
        nbytes: Their size in bytes.
        wrong: One sentence for each difference between directory and manifest. A file can have more than one.
        equal: How many of the files are as the manifest says.
        unknown: How many files the directory has that the manifest does not name.
        notes: Sentences on odd values of the source, as the manifest has them.
    """

    directory: Path
    files: int
    nbytes: int
    wrong: tuple[str, ...]
    equal: int
    unknown: int = 0
    notes: tuple[str, ...] = ()

    @property
    def different(self) -> int:
        """How many of the files are missing or not as the manifest says."""
        return self.files - self.equal

    def __repr__(self) -> str:
        size = f"{self.files} files, {format_size(self.nbytes)}"
        return f"<Recheck of {self.directory}: {size}, {self.different} different>"


def check_manifest(directory: Path, *, max_memory: int = 64 * 2**20, progress: Progress | None = None) -> Recheck:
    """Compare every file of a directory that we wrote with its manifest, through `max_memory` bytes of buffers."""
    manifest = read_manifest(directory)
    files, values = manifest["files"], manifest.get("values", {})
    sizes = {name: file["bytes"] for name, file in files.items()}
    total = sum(sizes.values())
    wrong = wrong_pieces(directory, sizes, pieces_of(files), max_memory, hashed=Count([total], progress))
    with refusals("list the directory", directory):
        there = {path.name for path in directory.iterdir() if not is_of_macos(path.name)}
        unknown = there - files.keys() - {MANIFEST_NAME}
    sentences = [*wrong.values(), *(f"{name}: the manifest does not name it" for name in sorted(unknown))]
    return Recheck(
        directory,
        len(files),
        total,
        tuple(dict.fromkeys(sentences)),
        len(files.keys() - {piece.file for piece in wrong}),
        len(unknown),
        value_notes(values, {}) if is_document(values) else (),
    )
