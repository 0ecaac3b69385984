"""Write a sharded native model as an hf directory: each rank its own experts, at their place in the final files.

Names, shapes and dtypes alone say where every byte goes, so every rank knows all files before any is written. Experts
that are cut along an inner axis are made whole a block at a time by the ranks that share them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.checkpoint.config import read_config
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import checkpoint_targets
from gemma4_moe.checkpoint.side_files import check_side_file, is_side_file
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.converter.blocks import BLOCK_BYTES, row_bytes, rows_at_once
from gemma4_moe.distributed.collectives import gather
from gemma4_moe.distributed.placements import Placed, as_bytes, local_of, placed
from gemma4_moe.distributed.ranks import current
from gemma4_moe.distributed.sharding import part_of
from gemma4_moe.errors import ParallelError, UnknownTensorError
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.dtypes import DType, named, target_dtype
from gemma4_moe.layout.names import natural_key
from gemma4_moe.layout.table import DOWN, Layout, Operation, transposes
from gemma4_moe.model_io.load import state_of, storage_key
from gemma4_moe.sizes import format_size, parse_size
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, layout_files
from gemma4_moe.target.pieces import piece_of
from gemma4_moe.target.preconditions import check_target
from gemma4_moe.target.transaction import Transaction
from gemma4_moe.target.writers import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.layout.targets import Target
    from gemma4_moe.target.pieces import Piece


@dataclass(frozen=True, slots=True, repr=False)
class Saved:
    """The result of `save_hf`.

    Attributes:
        path: The directory.
        files: The size of each weight file in bytes, by name.
        tensors: Number of tensors.
        written_bytes: Bytes of tensors that this rank wrote.
    """

    path: Path
    files: dict[str, int]
    tensors: int
    written_bytes: int

    def __repr__(self) -> str:
        size = f"{self.tensors:,} tensors, {len(self.files)} files, {format_size(sum(self.files.values()))}"
        return f"<Saved in {self.path}: {size}; {format_size(self.written_bytes)} by this rank>"


@dataclass(slots=True)
class Native:
    """A native tensor as all ranks see it: `mesh` are the ranks of its mesh, if any, and `ranks` those with a part."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    placements: str
    mesh: tuple[int, ...]
    ranks: list[int]

    def __str__(self) -> str:
        return f"torch.{self.dtype.name} {list(self.shape)}, {self.placements},"

    @property
    def writers(self) -> list[int]:
        """The ranks that may write it. If several meshes hold all of it, as data-parallel groups do, the first's."""
        return list(self.mesh) or self.ranks


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
        max_shard_size: The most bytes of tensors in one file, or text such as "5GB"; see `convert`.
        dtype: The dtype of every floating-point tensor, such as "bfloat16"; each one's own by default.
        overwrite: Replace `path` if it is a checkpoint and nothing else.
        read_back: Read every file from the device and compare its hashes before the target appears.

    Raises:
        InputError: The state is not a Gemma 4 MoE model in the nemo layout, or not that of the config.
        UsageError: The target may not be written.
        StorageError: The disk refused, or gave back other bytes than were written. The target is as it was.
        TargetBusyError: Another process is writing the target.
        ParallelError: Ranks disagree on a tensor, or another rank failed.
    """
    ranks, target, config_from = current(), expanded(path), expanded(config_from)
    with ranks.together("prepare the checkpoint"):
        state = _without_tied_head(state_of(module_or_state))
        side_files = _side_files(config_from)
        shard_bytes = parse_size(max_shard_size)
        described = _describe(state, ranks.rank)
    called = [str(target.absolute()), str(config_from.absolute()), shard_bytes, dtype, overwrite, read_back]
    tensors = _union_of(ranks.everyones((called, described)))
    with ranks.together("plan the checkpoint"):
        targets = _make_targets(tensors, config_from, dtype)
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
    sizes = {file.name: file.size for file in files}
    return Saved(target, sizes, len(targets), sum(piece.size for piece in own))


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
    tied = {name for name, t in state.items() if name.endswith("lm_head.weight") and storage_key(t) in embeddings}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _describe(state: Mapping[str, torch.Tensor], rank: int) -> list[Native]:
    """Return the tensors that a rank has or has a part of."""
    found = []
    for name, tensor in state.items():
        placements, mesh = "whole", ()
        if isinstance(tensor, DTensor):
            placements, mesh = str(tensor.placements), tuple(tensor.device_mesh.mesh.flatten().tolist())
        found.append(Native(name, tuple(tensor.shape), named(str(tensor.dtype)), placements, mesh, [rank]))
    return found


def _union_of(given: Sequence[tuple[list[object], list[Native]]]) -> dict[str, Native]:
    """Return every tensor that any rank has, by name, from each rank's arguments and tensors, which must agree."""
    for rank, (called, _) in enumerate(given):
        if called != given[0][0]:
            raise ParallelError(
                "ranks disagree on what to save",
                expected=f"{given[0][0]}, as on rank 0",
                found=f"{called} on rank {rank}",
                hint="call with the same arguments on all ranks",
            )
    union: dict[str, Native] = {}
    for own in (native for _, natives in given for native in natives):
        known = union.setdefault(own.name, own)
        if (known.shape, known.dtype, known.placements) != (own.shape, own.dtype, own.placements):
            raise ParallelError(
                "ranks disagree on a tensor",
                tensor=own.name,
                expected=f"{known} as on rank {known.ranks[0]}",
                found=f"{own} on rank {own.ranks[0]}",
                hint="call with the state of one model on all ranks",
            )
        if known is not own:
            known.ranks += own.ranks
    for name, native in union.items():
        if absent := [rank for rank in native.mesh if rank not in native.ranks]:
            raise ParallelError(
                "a rank has no part of a tensor that it should hold a part of",
                tensor=name,
                expected=f"a part on each rank of {native.mesh}",
                found=f"none on {absent}",
                hint="call with the state of one model on all ranks",
            )
    return {name: union[name] for name in sorted(union, key=natural_key)}


def _make_targets(tensors: Mapping[str, Native], config_from: Path, dtype: str | None) -> dict[str, Target[Native]]:
    """Return every tensor of the checkpoint by name, after the checks of `checkpoint_targets`."""
    cast = None if dtype is None else target_dtype(dtype)
    targets = checkpoint_targets(tensors.values(), Layout.NEMO, read_config(config_from), cast)
    if all(target.operation is Operation.KEEP for target in targets.values()):
        raise UnknownTensorError(
            "no expert tensor in the state",
            expected=f"names such as <prefix>layers.<number>.{DOWN.nemo}",
            found=f"{len(tensors)} tensors",
            hint="give a model in the nemo layout",
        )
    return targets


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
                row = row_bytes(entry.nbytes, entry.shape)
                for first, rows in _rows(state, targets[entry.name], work.ranks.rank, number):
                    raw = as_bytes(rows.cpu()).numpy().data
                    # Hashed before it is written: the device must give back what is in memory.
                    pieces.append(piece_of(file.name, entry.start + first * row, raw))
                    writer.write(pieces[-1].start, raw)
    return pieces


def _rows(
    state: Mapping[str, torch.Tensor], target: Target[Native], rank: int, number: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row, and the rows in the target's layout and dtype, of every run that a rank writes.

    A whole tensor is written by one rank, chosen by `number`, and of replicas by the rank at 0. Ranks that hold parts
    of the same rows make them whole, in steps that follow from the whole rows, and write the blocks by turns.
    """
    writers, dtype = target.origin.writers, getattr(torch, target.dtype.name)
    if rank not in writers:
        return
    tensor = torch.ones(target.shape, dtype=dtype) if target.source is None else state[target.origin.name]
    local = local_of(tensor) if tensor.ndim else local_of(tensor).reshape(1)
    runs: tuple[range, ...] = (range(len(local)),)
    along, sharers, turn = None, 1, 0
    if isinstance(tensor, DTensor):
        where = placed(tensor, target.name)
        coordinate = where.mesh.get_coordinate()
        assert coordinate is not None, "a rank that holds a DTensor is in its mesh"
        if any(own for own, placement in zip(coordinate, where.placements, strict=True) if placement is None):
            return
        runs, inner = where.runs(tensor.shape)[0], where.inner_dims
        along = Placed(where.mesh, tuple(p if dim in inner else None for dim, p in enumerate(where.placements)))
        for dim in inner:
            sharers, turn = sharers * where.mesh.size(dim), turn * where.mesh.size(dim) + coordinate[dim]
    elif writers[number % len(writers)] != rank:
        return
    step = rows_at_once(prod(tensor.shape[1:]) * tensor.element_size())
    for count, first in enumerate(range(0, len(local), step)):
        block = local[first : first + step]
        if along is not None:
            block = gather(block, along, (len(block), *tensor.shape[1:]), BLOCK_BYTES)
        if count % sharers == turn:
            block = _converted(block, target.operation, dtype)
            for run in part_of(runs, first, first + len(block)):
                yield run.start, block[: len(run)]
                block = block[len(run) :]


def _converted(block: torch.Tensor, operation: Operation, dtype: torch.dtype) -> torch.Tensor:
    if transposes(operation):
        block = transpose_scale_cast(block, dtype=dtype)
    elif block.dtype != dtype:
        block = scale_cast(block, dtype=dtype)
    return block
