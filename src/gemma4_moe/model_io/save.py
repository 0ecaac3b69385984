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
from gemma4_moe.checkpoint.index import INDEX_NAME
from gemma4_moe.checkpoint.side_files import check_side_file, is_side_file
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.converter.blocks import BLOCK_BYTES
from gemma4_moe.distributed.collectives import gather
from gemma4_moe.distributed.placements import Placed, as_bytes, local_of, placed
from gemma4_moe.distributed.ranks import current
from gemma4_moe.distributed.sharding import part_of
from gemma4_moe.errors import ParallelError
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.table import transposes
from gemma4_moe.model_io.load import rows_at_once, state_of, storage_key
from gemma4_moe.model_io.saving_plan import describe, make_targets
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, layout_files
from gemma4_moe.target.preconditions import check_target
from gemma4_moe.target.read_back import Written
from gemma4_moe.target.transaction import Transaction, copy_side_files, write_index_file
from gemma4_moe.target.writers import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.checkpoint.header import TensorEntry
    from gemma4_moe.layout.targets import Target
    from gemma4_moe.model_io.saving_plan import Native
    from gemma4_moe.target.file_layout import PlannedFile


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save_hf` wrote.

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
        config_from: A directory with the model's config.json; that and tokenizer, templates, license are taken along.
        max_shard_size: The most bytes of tensors in one file; a larger tensor gets a file of its own.
        dtype: The dtype of every floating-point tensor, such as "bfloat16"; each one's own by default.
        overwrite: Replace `path` if it is a checkpoint and nothing else.
        read_back: Read every file from the device and compare its hashes before the target appears; each rank reads
            what it has written.

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
    transaction, kept = None, Written() if read_back else None
    with ExitStack() as stack:
        with ranks.together("make the target's files"):
            if ranks.is_first:
                check_target(target, config_from, overwrite=overwrite)
                transaction = stack.enter_context(Transaction(target))
                out = transaction.out
                _make_files(files, transaction.out, kept)
        (out, *_) = ranks.everyones(None if transaction is None else transaction.out)
        confirm = None if transaction is None else transaction.confirm
        with ranks.together("write its tensors"):
            written = _write(state, targets, files, _Place(out, ranks.rank, kept, confirm))
        _check_complete(ranks.everyones(written), files)
        with ranks.together("write what stands beside the weights"):
            if ranks.is_first:
                _write_beside(side_files, files, out, kept)
        if kept is not None:
            with ranks.together("read back what was written"):
                kept.check(BLOCK_BYTES, None if confirm is None else lambda _: confirm())
        with ranks.together("publish the checkpoint"):
            if transaction is not None:
                transaction.publish(overwrite=overwrite)
    return Saved(target, {file.name: file.size for file in files}, len(targets), written)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank writes.

    Attributes:
        out: The directory.
        rank: The rank.
        kept: Told of all that is written, or None.
        confirm: Called now and then; raises if the target is not ours any more. Rank 0's.
    """

    out: Path
    rank: int
    kept: Written | None
    confirm: Callable[[], None] | None


def _make_files(files: tuple[PlannedFile, ...], out: Path, kept: Written | None) -> None:
    """Make each weight file at its full size, with its header."""
    for file in files:
        SafetensorsWriter(out / file.name, file.header, file.size).close()
        if kept is not None:
            kept.note(out / file.name, 0, memoryview(file.header))


def _write_beside(side_files: list[Path], files: tuple[PlannedFile, ...], out: Path, kept: Written | None) -> None:
    """Write the side files, and the index if there is one."""
    copy_side_files(side_files, out)
    index = write_index_file({file.name: file.entries for file in files}, out)
    if kept is not None:
        if index:
            kept.note(out / INDEX_NAME, 0, memoryview(index))
        for path in side_files:
            kept.note_copy(out / path.name, path, BLOCK_BYTES)


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
    files: tuple[PlannedFile, ...],
    place: _Place,
) -> int:
    """Write this rank's share of every tensor that it has, bring it to the device, and return its size in bytes."""
    written = 0
    for file in files:
        with SafetensorsWriter.reopen(place.out / file.name, file.size) as writer:
            for number, entry in enumerate(file.entries):
                if place.confirm is not None:
                    place.confirm()
                target = targets[entry.name]
                writers = target.origin.writers
                mine = writers[number % len(writers)] == place.rank
                for first, rows in _rows(state, target, mine=mine) if place.rank in writers else ():
                    raw = as_bytes(rows.cpu()).numpy().data
                    offset = entry.start + first * (entry.nbytes // max(1, _row_count(entry)))
                    if place.kept is not None:  # before it is written: what is in memory is what must come back
                        place.kept.note(writer.path, offset, raw)
                    writer.write(offset, raw)
                    written += raw.nbytes
    return written


def _check_complete(written: list[int], files: tuple[PlannedFile, ...]) -> None:
    """Check that the ranks together have written every byte: a hole would read as zeros."""
    expected = sum(entry.nbytes for file in files for entry in file.entries)
    if sum(written) != expected:
        raise ParallelError(
            "the ranks together did not write every byte once",
            expected=f"{expected} bytes",
            found=f"{sum(written)} bytes: {written} by rank",
            hint="give a tensor as DTensor on all ranks, or as the whole tensor on all of them",
        )


def _row_count(entry: TensorEntry) -> int:
    return entry.shape[0] if entry.shape else 1


def _rows(
    state: Mapping[str, torch.Tensor], target: Target[Native], *, mine: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row, and rows in the target's layout and dtype, of every block that this rank is to write.

    A plain tensor, or a scale, is written by the one rank of which `mine` is true.
    """
    if target.source is None:
        if mine:
            yield 0, torch.ones(target.shape, dtype=getattr(torch, target.dtype.name))
        return
    tensor = state.get(target.origin.name)
    if isinstance(tensor, DTensor):
        yield from _sharded_rows(tensor, target)
    elif tensor is not None and mine:
        local = local_of(tensor) if tensor.ndim else local_of(tensor).reshape(1)
        for first, block in _blocks(local):
            yield first, _converted(block, target)


def _sharded_rows(tensor: DTensor, target: Target[Native]) -> Iterator[tuple[int, torch.Tensor]]:
    where, local = placed(tensor, target.name), local_of(tensor)
    coordinate = where.mesh.get_coordinate()
    assert coordinate is not None, "a rank that holds a DTensor is in its mesh"
    if any(own for own, placement in zip(coordinate, where.placements, strict=True) if placement is None):
        return  # a replica: the rank at 0 of that dimension writes
    inner = [dim for dim, placement in enumerate(where.placements) if placement is not None and placement.axis != 0]
    along = Placed(where.mesh, tuple(p if dim in inner else None for dim, p in enumerate(where.placements)))
    sharers = prod(where.mesh.size(dim) for dim in inner)
    turn = sum(coordinate[dim] * prod(where.mesh.size(d) for d in inner if d > dim) for dim in inner)
    held = where.runs(tensor.shape)[0]
    for number, (first, block) in enumerate(_blocks(local)):
        whole = gather(block, along, (len(block), *tensor.shape[1:]), BLOCK_BYTES)
        if number % sharers != turn:
            continue
        converted, done = _converted(whole, target), 0
        for run in part_of(held, first, first + len(block)):
            yield run.start, converted[done : done + len(run)]
            done += len(run)


def _blocks(local: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield runs of rows of about `BLOCK_BYTES`, and the position of the first in each."""
    row_bytes = prod(local.shape[1:]) * local.element_size()
    step = rows_at_once(row_bytes)
    for first in range(0, len(local), step):
        yield first, local[first : first + step]


def _converted(block: torch.Tensor, target: Target[Native]) -> torch.Tensor:
    dtype = getattr(torch, target.dtype.name)
    if transposes(target.operation):
        block = transpose_scale_cast(block, dtype=dtype)
    elif block.dtype != dtype:
        block = scale_cast(block, dtype=dtype)
    return block
