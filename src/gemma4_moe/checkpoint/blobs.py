"""Files of the Hub's cache: blobs whose name is the SHA-256 of their bytes, so that damage can be found."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.hashing import Extent, hash_extents
from gemma4_moe.checkpoint.storage import resolved
from gemma4_moe.errors import CheckpointFormatError, command_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma4_moe.checkpoint.file import OpenFile

_SHA256 = re.compile("[0-9a-f]{64}")
_REPOSITORY = re.compile(r"models--(.+)--(.+)")


def check_blob(path: Path, digest: str) -> None:
    """Check the SHA-256 of a file's bytes, in hexadecimal, if the file is a link to a blob of the Hub's cache.

    Raises:
        CheckpointFormatError: It is not the blob's name.
    """
    expected = _name_of_blob(path)
    if expected in (None, digest):
        return
    repository = next((found for part in path.parts if (found := _REPOSITORY.fullmatch(part))), None)
    model = "MODEL" if repository is None else f"{repository[1]}/{repository[2]}"
    raise CheckpointFormatError(
        "a file of the Hub's cache is damaged: its bytes don't have the SHA-256 that is its name",
        file=path,
        expected=expected,
        found=digest,
        hint=f"fetch it again: {command_line('hf', 'download', model, path.name, '--force-download')}",
    )


def check_blobs(files: Iterable[OpenFile], memory: int) -> None:
    """Hash those files that are blobs of the Hub's cache, and check each as `check_blob` does.

    At most `memory` bytes of buffers are used.
    """
    blobs = [file for file in files if _name_of_blob(file.path) is not None]
    whole = [(Extent(file, 0, file.size),) for file in blobs]
    digests = hash_extents(whole, memory, algorithm=hashlib.sha256) if whole else []
    for file, digest in zip(blobs, digests, strict=True):
        check_blob(file.path, digest)


def _name_of_blob(path: Path) -> str | None:
    """Return the SHA-256 that a link's blob should have, or None for any other file."""
    if not path.is_symlink():
        return None
    blob = resolved(path)
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
