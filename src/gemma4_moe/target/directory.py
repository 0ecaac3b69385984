"""The files of a target: made at full size, written in pieces, completed and read back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.agreement import are_numbered
from gemma4_moe.checkpoint.index import INDEX_NAME, write_index
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME
from gemma4_moe.checkpoint.storage import refusals, sync_directory, write_file
from gemma4_moe.errors import ParallelError, StorageError
from gemma4_moe.target.manifest import FORMAT, described_files, encode_manifest
from gemma4_moe.target.pieces import gaps, piece_of, wrong_pieces
from gemma4_moe.target.writers import SafetensorsWriter
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.distributed.ranks import Ranks
    from gemma4_moe.target.file_layout import PlannedFile
    from gemma4_moe.target.pieces import Piece

#: Bytes of a piece of a file that is copied.
_COPY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """The weight files of one target, in the directory `out` where they are written. Each rank has an equal one.

    They are read back with at most `memory` bytes of buffers, and through the page cache if `buffered`.
    """

    out: Path
    files: tuple[PlannedFile, ...]
    ranks: Ranks
    memory: int
    buffered: bool = False

    def make(self) -> None:
        """Make each weight file at its full size, or keep the one that is there; remove all others. For one rank."""
        sizes = {file.name: file.size for file in self.files}
        with refusals("look at the directory", self.out):
            for path in self.out.iterdir():
                if path.name not in sizes or path.stat().st_size != sizes[path.name]:
                    path.unlink()
            found = {path.name for path in self.out.iterdir()}
        for file in self.files:
            path = self.out / file.name
            if file.name in found:
                with SafetensorsWriter.reopen(path, file.size) as writer:
                    writer.write(0, memoryview(file.header))
            else:
                SafetensorsWriter(path, file.header, file.size).close()
        sync_directory(self.out)

    def complete(
        self,
        own: Iterable[Piece],
        side_files: Sequence[Path],
        describe: Callable[[dict[str, Any]], dict[str, Any]],
        documents: Callable[[], Mapping[str, bytes]] = dict,
    ) -> list[Piece]:
        """Write side files, index and manifest once the weights are on the device. All ranks must call.

        `own` are the pieces of this rank, without headers. `describe` is called on the first rank with the manifest's
        `files`. It may add to them, and returns the manifest's other fields. So is `documents`: it returns contents by
        the names of files, which are written in the place of side files of these names, or beside them. The result has
        the pieces of all files, the manifest's too.
        """
        weights = [piece_of(file.name, 0, file.header) for file in self.files]
        weights += [piece for pieces in self.ranks.everyones(list(own)) for piece in pieces]
        pieces: list[Piece] = []
        with self.ranks.together("write the manifest"):
            if self.ranks.is_first:
                self._check_covered(weights)
                made = documents()
                copied = [path for path in side_files if path.name not in made]
                pieces = [*weights, *copy_files(copied, self.out), *self._write_index()]
                pieces += [self._write(name, content) for name, content in made.items()]
                files = described_files(pieces)
                document = {"format": FORMAT, "gemma4_moe": __version__, **describe(files), "files": files}
                pieces.append(self._write(MANIFEST_NAME, encode_manifest(document)))
                sync_directory(self.out)
        (pieces, *_) = self.ranks.everyones(pieces)
        return pieces

    def read_back(self, pieces: Sequence[Piece], hashed: Callable[[int], None] | None = None) -> None:
        """Compare the files on the device with the pieces of `complete`, each rank a part. All ranks must call.

        `hashed` is told of the bytes of every piece. It may raise, such as if our lock was broken.
        """
        sizes = {name: said["bytes"] for name, said in described_files(pieces).items()}
        mine = pieces[self.ranks.rank :: self.ranks.world]
        with self.ranks.together("read back what was written"):
            wrong = wrong_pieces(self.out, sizes, mine, self.memory, buffered=self.buffered, hashed=hashed)
            if wrong:
                raise StorageError(
                    "the disk gives back other bytes than were written",
                    file=self.out,
                    found="; ".join(list(dict.fromkeys(wrong.values()))[:5]),
                    hint="check the disk and the memory, then write again (convert: give --resume)",
                )

    def _check_covered(self, pieces: Sequence[Piece]) -> None:
        """Check that the ranks together have written every byte: a hole would read as zeros."""
        described = described_files(pieces)
        for file in self.files:
            if holes := gaps([(start, end) for start, end, _ in described[file.name]["pieces"]], file.size):
                raise ParallelError(
                    "the ranks together did not write every byte once",
                    file=self.out / file.name,
                    expected=f"{file.size} bytes",
                    found=f"nothing, or two pieces, at {holes[:5]}",
                    hint="give a tensor as DTensor on all ranks, or as the whole tensor on all of them",
                )

    def _write_index(self) -> list[Piece]:
        """Write the index; a single file needs none, and names that count their files take its place."""
        names = {entry.name: file.name for file in self.files for entry in file.entries}
        total = sum(entry.nbytes for file in self.files for entry in file.entries)
        is_needed = len(self.files) > 1 and not are_numbered([file.name for file in self.files])
        return [self._write(INDEX_NAME, write_index(names, total))] if is_needed else []

    def _write(self, name: str, content: bytes) -> Piece:
        write_file(self.out / name, content)
        return piece_of(name, 0, content)


def copy_files(paths: Iterable[Path], out: Path) -> list[Piece]:
    """Copy files byte for byte into `out`, bring them to the device, and return their pieces."""
    pieces: list[Piece] = []
    for path in paths:
        action = refusals(f"copy the file into {out}", path)
        with action, path.open("rb") as original, (out / path.name).open("xb") as copy:
            start = 0
            while content := original.read(_COPY_BYTES):
                copy.write(content)
                pieces.append(piece_of(path.name, start, content))
                start += len(content)
            if not start:
                pieces.append(piece_of(path.name, 0, b""))  # an empty file has one piece
            copy.flush()
            os.fsync(copy.fileno())
    return pieces
