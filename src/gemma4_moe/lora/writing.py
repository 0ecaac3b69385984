"""The new directory of an adapter: absent, or complete and read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe.distributed.ranks import Ranks
from gemma4_moe.lora.config import WEIGHTS_NAME
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import PlannedFile, layout_header
from gemma4_moe.target.pieces import piece_of
from gemma4_moe.target.transaction import Transaction
from gemma4_moe.target.writers import SafetensorsWriter

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
    planned = PlannedFile(WEIGHTS_NAME, header, entries, entries[-1].end)
    with Transaction(target) as transaction:
        files = TargetFiles(transaction.out, (planned,), Ranks(), _MEMORY)
        files.make()
        with SafetensorsWriter.reopen(files.out / WEIGHTS_NAME, planned.size) as writer:
            own = list(_write(writer, groups, {entry.name: entry.start for entry in entries}))
        pieces = files.complete(
            own, (), lambda _: {"options": dict(options)}, lambda: {name: _text(d) for name, d in documents.items()}
        )
        files.read_back(pieces)
        confirm()
        transaction.publish(overwrite=False)
    return planned.size


def _write(
    writer: SafetensorsWriter, groups: Iterable[tuple[list[Written], Callable[[], Array]]], places: Mapping[str, int]
) -> Iterator[Piece]:
    for tensors, read in groups:
        plain = read()
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.cut(plain)).reshape(-1).view(np.uint8).data
            writer.write(places[tensor.name], content)
            yield piece_of(WEIGHTS_NAME, places[tensor.name], content)


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
