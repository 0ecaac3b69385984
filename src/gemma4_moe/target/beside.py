"""What stands beside the weights in a directory that we write: the index, and the files that are taken along."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.index import INDEX_NAME, write_index
from gemma4_moe.checkpoint.storage import refusals, write_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.header import TensorEntry


def copy_side_files(paths: Iterable[Path], out: Path) -> None:
    """Copy files byte for byte into `out`, and bring them to the device.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    for path in paths:
        with refusals(f"copy the file into {out}", path):
            shutil.copyfile(path, out / path.name)
            with (out / path.name).open("rb") as copy:
                os.fsync(copy.fileno())


def write_index_file(files: Mapping[str, Iterable[TensorEntry]], out: Path) -> bytes:
    """Write the index of several files into `out`, and return its bytes; a single file needs none, and none are given.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    if len(files) == 1:
        return b""
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    index = write_index(weight_map, sum(entry.nbytes for entries in files.values() for entry in entries))
    write_file(out / INDEX_NAME, index)
    return index
