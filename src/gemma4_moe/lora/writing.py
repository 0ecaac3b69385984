"""The new directory of an adapter: absent, or complete and read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.checkpoint.side_files import MANIFEST_NAME
from gemma4_moe.checkpoint.storage import sync_directory, write_file
from gemma4_moe.errors import StorageError
from gemma4_moe.lora.opening import WEIGHTS_NAME
from gemma4_moe.target.file_layout import layout_header
from gemma4_moe.target.manifest import FORMAT, described_files, encode_manifest
from gemma4_moe.target.pieces import piece_of, wrong_pieces
from gemma4_moe.target.transaction import Transaction
from gemma4_moe.target.writers import SafetensorsWriter
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.lora.forms import Written
    from gemma4_moe.lora.modules import Array
    from gemma4_moe.target.pieces import Piece

#: Bytes of buffers with which the files are read back.
_MEMORY = 64 * 2**20


def write_adapter(
    target: Path,
    groups: Iterable[tuple[list[Written], Callable[[], Array]]],
    documents: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    confirm: Callable[[], None],
) -> int:
    """Write the directory of an adapter, read it back, publish it, and return the bytes of its weights.

    A group has the tensors that are cut from one plain tensor, and the function that reads that. One plain tensor is
    in memory at a time. `confirm` is called before the directory appears, and raises if the source has changed.
    """
    groups = list(groups)
    header, entries = layout_header(
        [(name, dtype, shape) for tensors, _ in groups for name, dtype, shape, _ in tensors], {"format": "pt"}
    )
    size = entries[-1].end
    places = {entry.name: entry.start for entry in entries}
    with Transaction(target) as transaction:
        out = transaction.out
        with SafetensorsWriter(out / WEIGHTS_NAME, header, size) as writer:
            pieces = [piece_of(WEIGHTS_NAME, 0, header), *_write(writer, groups, places)]
        for name, document in documents.items():
            pieces.append(_add(out, name, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()))
        files = described_files(pieces)
        manifest = {"format": FORMAT, "gemma4_moe": __version__, "options": dict(options), "files": files}
        pieces.append(_add(out, MANIFEST_NAME, encode_manifest(manifest)))
        sync_directory(out)
        sizes = {name: said["bytes"] for name, said in described_files(pieces).items()}
        if wrong := wrong_pieces(out, sizes, pieces, _MEMORY):
            found = "; ".join(list(wrong.values())[:5])
            raise StorageError("the disk gives back other bytes than were written", file=out, found=found)
        confirm()
        transaction.publish(overwrite=False)
    return size


def _write(
    writer: SafetensorsWriter, groups: Iterable[tuple[list[Written], Callable[[], Array]]], places: Mapping[str, int]
) -> Iterator[Piece]:
    for tensors, read in groups:
        plain = read()
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.cut(plain)).reshape(-1).view(np.uint8).data
            writer.write(places[tensor.name], content)
            yield piece_of(WEIGHTS_NAME, places[tensor.name], content)


def _add(out: Path, name: str, content: bytes) -> Piece:
    write_file(out / name, content)
    return piece_of(name, 0, content)
