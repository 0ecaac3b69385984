"""Check a directory against its manifest: every file there, of its size, with its hashes, and no other file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.hashing import Chunk
from gemma4_moe.checkpoint.read_back import Extent, OpenFile, hash_extents
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.target.manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

#: The most bytes of buffers.
DEFAULT_MEMORY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Recheck:
    """What a check against a manifest found.

    Attributes:
        directory: The directory.
        files: How many files the manifest names.
        nbytes: Their size in bytes.
        wrong: One sentence for each way in which the directory is not what the manifest says.
    """

    directory: Path
    files: int
    nbytes: int
    wrong: tuple[str, ...]


def check_manifest(
    directory: Path, *, max_memory: int = DEFAULT_MEMORY, progress: Callable[[int, int], object] | None = None
) -> Recheck:
    """Compare every file of a directory that we wrote with what its manifest says of it.

    Args:
        directory: The directory.
        max_memory: The most bytes of buffers.
        progress: Told of the bytes that were read so far, and of their total.

    Raises:
        CheckpointFormatError: There is no manifest, or it is none of ours.
        StorageError: The disk or its permissions refused.
    """
    files = read_manifest(directory)["files"]
    total = sum(file["bytes"] for file in files.values())
    wrong = wrong_files(directory, files, max_memory, progress=progress)
    with refusals("list the directory", directory):
        unknown = {path.name for path in directory.iterdir()} - files.keys() - {MANIFEST_NAME}
    wrong += [f"{name}: the manifest does not name it" for name in sorted(unknown)]
    return Recheck(directory, len(files), total, tuple(wrong))


def wrong_files(
    directory: Path,
    files: Mapping[str, Any],
    max_memory: int,
    *,
    buffered: bool = False,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Say which files are not what a manifest says, and where. Of the chunks, only every `parts`-th is looked at.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    wrong: list[str] = []
    extents: dict[Chunk, Extent] = {}
    expected: dict[Chunk, str] = {}
    with ExitStack() as stack:
        for name, said in sorted(files.items()):
            with refusals("look at the file", directory / name):
                there = (directory / name).is_file()
            if not there:
                wrong.append(f"{name}: missing")
                continue
            file = stack.enter_context(OpenFile(directory / name))
            if file.size != said["bytes"]:
                wrong.append(f"{name}: {file.size} bytes, not {said['bytes']}")
                continue
            extents |= file.chunks()
            expected |= {Chunk(name, number): digest for number, digest in enumerate(said["blake3"])}
        mine = {chunk: extents[chunk] for chunk in list(extents)[part::parts]}
        count = _Count(sum(extent.end - extent.start for extent in mine.values()), progress)
        found = hash_extents(mine, max_memory, buffered=buffered, hashed=count)
    for chunk, digest in found.items():
        if digest != expected.get(chunk):
            start, end = mine[chunk].start, mine[chunk].end
            wrong.append(f"{chunk.name}: other bytes in [{start}, {end}): BLAKE3 {digest}, not {expected.get(chunk)}")
    return wrong


class _Count:
    """Adds up what is done and tells a progress callback."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
