"""Write a sharded native model as an hf directory: each rank its own experts, at their place in the final files.

Names, shapes and dtypes alone say where every byte goes, so every rank knows all files before any is written. Experts
that are cut along an inner axis are made whole a block at a time by the ranks that share them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.checkpoint.completeness import check_complete, folded
from gemma4_moe.checkpoint.config_dtype import rewritten
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import checkpoint_targets
from gemma4_moe.converter.blocks import BLOCK_BYTES, row_bytes, rows_at_once
from gemma4_moe.distributed.gathering import gather
from gemma4_moe.distributed.placements import Placed, as_bytes, local_of, placed
from gemma4_moe.distributed.ranks import current
from gemma4_moe.distributed.sharding import part_of
from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.dtypes import require_model_dtype, target_dtype
from gemma4_moe.layout.table import DOWN, Layout, Operation, transposes
from gemma4_moe.model_io.load import state_of
from gemma4_moe.model_io.native import describe, union_of, without_tied_head
from gemma4_moe.model_io.template import read_template
from gemma4_moe.sizes import format_size, parse_size
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE, layout_files
from gemma4_moe.target.pieces import piece_of
from gemma4_moe.target.preconditions import check_target
from gemma4_moe.target.transaction import Transaction
from gemma4_moe.target.writers import SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.layout.targets import Target
    from gemma4_moe.model_io.native import Native
    from gemma4_moe.model_io.template import Template
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


def save_hf(
    module_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    config_from: str | Path,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    read_back: bool = True,
) -> Saved:
    """Write a native model as a checkpoint in the hf layout, `per_expert_scale` as ones. All ranks must call.

    Before anything is written, names and shapes are compared with those that the config calls for, and with those of
    the weights in `config_from`, if there are any.

    Args:
        module_or_state: A module whose `state_dict()` has nemo names, or such a mapping. Names lose the components of
            torch's wrappers. DTensors of any placement; plain tensors are whole and the same on all ranks. An
            `lm_head` that is the embedding itself is left out. Ranks of several pipeline stages each give their own
            layers.
        path: A directory that does not exist yet, or is empty; on a filesystem that all ranks share.
        config_from: A directory with the model's config.json, or a Hub id; that and tokenizer, templates, license are
            copied.
        max_shard_size: The most bytes of tensors in one file, or text such as "5GB"; see `convert`.
        dtype: The dtype of every floating-point tensor, such as "bfloat16", also named in config.json; each one's own
            by default.
        allow_partial: Write a part of the model, such as one pipeline stage. The manifest has the names of the tensors
            that are missing.
        overwrite: Replace `path` if it is a checkpoint and nothing else.
        read_back: Read every file from the device and compare its hashes before the target appears.

    Raises:
        InputError: The state is not a Gemma 4 MoE model in the nemo layout, lacks a tensor of the model, has one that
            the model does not have, one of another shape, or one of a dtype in which no weight is loaded.
        UsageError: The target may not be written.
        StorageError: The disk refused, or gave back other bytes than were written. The target is as it was.
        TargetBusyError: Another process is writing the target.
        ParallelError: Ranks disagree on a tensor, or another rank failed.
    """
    ranks, target = current(), expanded(path)
    with ranks.together("prepare the checkpoint"):
        template = read_template(config_from)
        state = without_tied_head(state_of(module_or_state))
        shard_bytes = parse_size(max_shard_size)
        described = describe(state, ranks.rank)
    options: dict[str, Any] = {"to": Layout.HF, "dtype": dtype or "keep", "max_shard_size": shard_bytes}
    options |= {"read_back": read_back} | ({"allow_partial": True} if allow_partial else {})
    called = [str(target.absolute()), str(template.directory.absolute()), options, overwrite]
    tensors = union_of(ranks.everyones((called, described)))
    with ranks.together("plan the checkpoint"):
        targets, missing = _make_targets(tensors, template, dtype, allow_partial=allow_partial)
        files = layout_files([(t.name, t.dtype, t.shape) for t in targets.values()], shard_bytes, Layout.HF)
    transaction = None
    with ExitStack() as stack:
        with ranks.together("make the target's files"):
            if ranks.is_first:
                check_target(target, template.directory, overwrite=overwrite)
                transaction = stack.enter_context(Transaction(target))
                TargetFiles(transaction.out, files, ranks, BLOCK_BYTES).make()
        (out, *_) = ranks.everyones(None if transaction is None else transaction.out)
        work = TargetFiles(out, files, ranks, BLOCK_BYTES)
        confirm = None if transaction is None else transaction.confirm
        with ranks.together("write its tensors"):
            own = _write(state, targets, work, confirm)
        partial = {"missing": folded(missing)} if allow_partial else {}
        said = {"options": options, "layout": Layout.HF, **partial}
        side_files = template.side_files
        pieces = work.complete(own, side_files, lambda _: said, lambda: rewritten(side_files, dtype, dequantised=True))
        if read_back:
            work.read_back(pieces, lambda _: None if transaction is None else transaction.confirm())
        with ranks.together("publish the checkpoint"):
            if transaction is not None:
                transaction.publish(overwrite=overwrite)
    sizes = {file.name: file.size for file in files}
    return Saved(target, sizes, len(targets), sum(piece.size for piece in own))


def _make_targets(
    tensors: Mapping[str, Native], template: Template, dtype: str | None, *, allow_partial: bool
) -> tuple[dict[str, Target[Native]], list[str]]:
    """Return every tensor of the checkpoint by name, and the names of those that the state lacks."""
    cast = None if dtype is None else target_dtype(dtype)
    whole = not allow_partial
    targets = checkpoint_targets(tensors.values(), Layout.NEMO, template.config, cast, all_layers=whole)
    if all(target.operation is Operation.KEEP for target in targets.values()):
        raise UnknownTensorError(
            "no expert tensor in the state",
            expected=f"names such as <prefix>layers.<number>.{DOWN.nemo}",
            found=f"{len(tensors)} tensors",
            hint="give a model in the nemo layout",
        )
    for name, target in targets.items():
        require_model_dtype(name, target.dtype)
    shapes = {name: target.shape for name, target in targets.items()}
    missing = check_complete(shapes, template.shapes, template.config, template.weights, allow_missing=allow_partial)
    return targets, missing


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
