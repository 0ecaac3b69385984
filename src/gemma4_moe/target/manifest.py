"""`gemma4_moe.json`: what a converted directory says of how it came to be, and the hashes that it can be checked by.

It holds nothing that changes from run to run, no time and no path, so that equal conversions give equal bytes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import Chunk, Extent, OpenFile, chunk_count, hash_extents
from gemma4_moe.checkpoint.index import is_bare_name
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import StoredTensor

#: Raised when a reader of the old form would misunderstand the new one.
FORMAT = 1

#: The longest manifest that is read, in bytes. The real model's has about 0.4 MB.
LONGEST_MANIFEST = 64 * 2**20


def hashed_tensors(tensors: Iterable[StoredTensor], hashes: Mapping[Chunk, str]) -> dict[str, Any]:
    """Return what a manifest says of the source's tensors: size in bytes and hashes, by their names."""
    return {
        tensor.name: {"bytes": tensor.nbytes, "blake3": _digests(hashes, tensor.name, tensor.nbytes)}
        for tensor in tensors
    }


def encode_manifest(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory that we wrote.

    Raises:
        CheckpointFormatError: There is none, it is not JSON, or one of another form.
        StorageError: The disk or its permissions refused.
    """
    path = directory / MANIFEST_NAME
    with refusals("look at the directory", directory):
        if directory.is_dir() and not path.exists():
            raise CheckpointFormatError(
                "the directory has no manifest: it was not made by gemma4-moe convert",
                file=directory,
                expected=MANIFEST_NAME,
                hint="compare it with its source: gemma4-moe verify SRC DST",
            )
    raw = read_whole(path, LONGEST_MANIFEST)
    try:
        document = json.loads(raw)
        known = (
            document["format"] == FORMAT
            and isinstance(document["source"]["files"], dict)
            and isinstance(document["options"], dict)
            and all(is_bare_name(name) and _is_hashed(file) for name, file in document["files"].items())
        )
        chunk_bytes = document["hashes"]["chunk_bytes"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(path, str(error)) from error
    if not known or chunk_bytes != hashing.CHUNK_BYTES:
        raise _foreign(path, f"format {document['format']!r}, chunks of {chunk_bytes!r} bytes")
    return dict(document)


def _is_hashed(file: Any) -> bool:
    size, digests = file["bytes"], file["blake3"]
    return type(size) is int and size >= 0 and isinstance(digests, list) and len(digests) == chunk_count(size)


def _foreign(path: Path, found: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        "not a manifest that this version reads",
        file=path,
        expected=f"format {FORMAT}, chunks of {hashing.CHUNK_BYTES} bytes",
        found=found,
        hint="check the directory against its source: gemma4-moe verify SRC DST",
    )


def _digests(hashes: Mapping[Chunk, str], name: str, size: int) -> list[str]:
    return [hashes[Chunk(name, number)] for number in range(chunk_count(size))]


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
