"""Write a sharded native model as an hf directory: each rank its own experts, at their place in the final files.

There is no second copy and no step that puts parts together: names, shapes and dtypes alone say where every byte goes,
so every rank knows all files before any is written. Experts that are cut along an inner axis are made whole among the
ranks that share them, a block at a time, and each of these ranks writes some of the blocks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.checkpoint.config import read_config
from gemma4_moe.checkpoint.side_files import check_side_file, is_side_file
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.converter.blocks import BLOCK_BYTES
from gemma4_moe.distributed.collectives import gather
from gemma4_moe.distributed.placements import Placed, as_bytes, local_of, placed
from gemma4_moe.distributed.ranks import current
from gemma4_moe.distributed.sharding import part_of
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.table import Layout, transposes
from gemma4_moe.model_io.load import rows_at_once, state_of, storage_key
from gemma4_moe.model_io.saving_plan import describe, make_targets
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, layout_files
from gemma4_moe.target.pieces import piece_of
from gemma4_moe.target.preconditions import check_target
from gemma4_moe.target.transaction import Transaction
from gemma4_moe.target.writers import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.layout.targets import Target
    from gemma4_moe.model_io.saving_plan import Native
    from gemma4_moe.target.pieces import Piece


@dataclass(frozen=True, slots=True)
class Saved:
    """The result of `save_hf`.

    Attributes:
        path: The directory.
        files: Its weight files, bytes by name.
        tensors: Number of tensors.
        written_bytes: Bytes of tensors that this rank wrote.
    """

    path: Path
    files: dict[str, int]
    tensors: int
    written_bytes: int


def save_hf(
    module_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    config_from: str | Path,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: str | None = None,
    overwrite: bool = False,
    read_back: bool = True,
) -> Saved:
    """Write a native model as a checkpoint in the hf layout, `per_expert_scale` as ones. All ranks must call.

    Args:
        module_or_state: A module whose `state_dict()` has nemo names, or such a mapping. DTensors of any placement;
            plain tensors are whole and the same on all ranks. An `lm_head` that is the embedding itself is left
            out. Ranks of several pipeline stages each give their own layers.
        path: A directory that does not exist yet, or is empty; on a filesystem that all ranks share.
        config_from: A directory with the model's config.json; that and tokenizer, templates, license are copied.
        max_shard_size: The most bytes of tensors in one file; a larger tensor gets a file of its own.
        dtype: The dtype of every floating-point tensor, such as "bfloat16"; each one's own by default.
        overwrite: Replace `path` if it is a checkpoint and nothing else.
        read_back: Read every file from the device and compare its hashes before the target appears; each rank reads
            a part.

    Raises:
        InputError: The state is not a Gemma 4 MoE model in the nemo layout, or not that of the config.
        UsageError: The target may not be written.
        StorageError: The disk or its permissions refused, or gave back other bytes than were written; the target is
            absent, or as it was.
        TargetBusyError: Another process is writing the target.
        ParallelError: Ranks disagree on a tensor, or another rank failed.
    """
    ranks, target, config_from = current(), Path(path), Path(config_from)
    with ranks.together("prepare the checkpoint"):
        state = _without_tied_head(state_of(module_or_state))
        side_files = _side_files(config_from)
        shard_bytes = parse_size(max_shard_size)
    called = [str(target.absolute()), str(config_from.absolute()), shard_bytes, dtype, overwrite, read_back]
    tensors = describe(state, ranks, called)
    with ranks.together("plan the checkpoint"):
        targets = make_targets(tensors, config_from, dtype)
        files = layout_files([(t.name, t.dtype, t.shape) for t in targets.values()], shard_bytes)
    transaction = None
    with ExitStack() as stack:
        with ranks.together("make the target's files"):
            if ranks.is_first:
                check_target(target, config_from, overwrite=overwrite)
                transaction = stack.enter_context(Transaction(target))
                TargetFiles(transaction.out, files, ranks, BLOCK_BYTES).make()
        (out, *_) = ranks.everyones(None if transaction is None else transaction.out)
        work = TargetFiles(out, files, ranks, BLOCK_BYTES)
        confirm = None if transaction is None else transaction.confirm
        with ranks.together("write its tensors"):
            own = _write(state, targets, work, confirm)
        options = {"to": Layout.HF, "dtype": dtype or "keep", "max_shard_size": shard_bytes, "read_back": read_back}
        pieces = work.complete(own, side_files, lambda _: {"options": options, "layout": Layout.HF})
        if read_back:
            work.read_back(pieces, confirm)
        with ranks.together("publish the checkpoint"):
            if transaction is not None:
                transaction.publish(overwrite=overwrite)
    written = sum(piece.end - piece.start for piece in own)
    return Saved(target, {file.name: file.size for file in files}, len(targets), written)


def _side_files(directory: Path) -> list[Path]:
    read_config(directory)
    with refusals("list the directory", directory):
        found = sorted(entry for entry in directory.iterdir() if is_side_file(entry.name))
    for file in found:
        check_side_file(file)
    return found


def _without_tied_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out an output head that is the embedding itself: an hf directory has that once."""
    embeddings = {storage_key(tensor) for name, tensor in state.items() if name.endswith("embed_tokens.weight")}
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name.endswith("lm_head.weight") and storage_key(tensor) in embeddings)
    }


def _write(
    state: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target[Native]],
    work: TargetFiles,
    confirm: Callable[[], None] | None,
) -> list[Piece]:
    """Write this rank's share of every tensor that it has, bring it to the device, and return its pieces."""
    pieces = []
    for file in work.files:
        with SafetensorsWriter.reopen(work.out / file.name, file.size) as writer:
            for number, entry in enumerate(file.entries):
                if confirm is not None:
                    confirm()
                target = targets[entry.name]
                if (held := _held(state, target, work.ranks.rank, number)) is None:
                    continue
                row = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)
                for first, rows in held.blocks(target):
                    raw = as_bytes(rows.cpu()).numpy().data
                    # Hashed before it is written: the device must give back what is in memory.
                    pieces.append(piece_of(file.name, entry.start + first * row, raw))
                    writer.write(pieces[-1].start, raw)
    return pieces


@dataclass(frozen=True, slots=True)
class _Held:
    """The rows of one native tensor that this rank converts.

    Attributes:
        local: The rows.
        rows: Which rows of the whole tensor they are.
        along: Where the inner axes are cut, and over which ranks; None for a tensor that is whole.
        shape: The shape of the whole tensor.
        sharers: How many ranks hold parts of the same rows; they write the blocks by turns.
        turn: Which of these turns is this rank's.
    """

    local: torch.Tensor
    rows: tuple[range, ...]
    along: Placed | None
    shape: tuple[int, ...]
    sharers: int = 1
    turn: int = 0

    def blocks(self, target: Target[Native]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row, and the rows in the target's layout and dtype, of every run that this rank writes."""
        step = rows_at_once(prod(self.local.shape[1:]) * self.local.element_size())
        for number, first in enumerate(range(0, len(self.local), step)):
            block = self.local[first : first + step]
            if self.along is not None:
                block = gather(block, self.along, (len(block), *self.shape[1:]), BLOCK_BYTES)
            if number % self.sharers != self.turn:
                continue
            converted, done = _converted(block, target), 0
            for run in part_of(self.rows, first, first + len(block)):
                yield run.start, converted[done : done + len(run)]
                done += len(run)


def _held(state: Mapping[str, torch.Tensor], target: Target[Native], rank: int, number: int) -> _Held | None:
    """Return the rows of a target that a rank converts. A whole tensor is written by one rank, chosen by `number`."""
    writers = target.origin.writers
    if rank not in writers:
        return None
    tensor = None if target.source is None else state.get(target.origin.name)
    if isinstance(tensor, DTensor):
        return _held_shard(tensor, target.name)
    if writers[number % len(writers)] != rank:
        return None
    if target.source is None:
        tensor = torch.ones(target.shape, dtype=getattr(torch, target.dtype.name))
    if tensor is None:
        return None
    local = local_of(tensor) if tensor.ndim else local_of(tensor).reshape(1)
    return _Held(local, (range(len(local)),), None, tuple(local.shape))


def _held_shard(tensor: DTensor, name: str) -> _Held | None:
    """Return the rows of a DTensor that this rank converts; None for a replica, which the rank at 0 writes."""
    where = placed(tensor, name)
    coordinate = where.mesh.get_coordinate()
    assert coordinate is not None, "a rank that holds a DTensor is in its mesh"
    if any(own for own, placement in zip(coordinate, where.placements, strict=True) if placement is None):
        return None
    inner = [dim for dim, placement in enumerate(where.placements) if placement is not None and placement.axis != 0]
    along = Placed(where.mesh, tuple(p if dim in inner else None for dim, p in enumerate(where.placements)))
    turn = sum(coordinate[dim] * prod(where.mesh.size(d) for d in inner if d > dim) for dim in inner)
    sharers = prod(where.mesh.size(dim) for dim in inner)
    return _Held(local_of(tensor), where.runs(tensor.shape)[0], along, tuple(tensor.shape), sharers, turn)


def _converted(block: torch.Tensor, target: Target[Native]) -> torch.Tensor:
    dtype = getattr(torch, target.dtype.name)
    if transposes(target.operation):
        block = transpose_scale_cast(block, dtype=dtype)
    elif block.dtype != dtype:
        block = scale_cast(block, dtype=dtype)
    return block
