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
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe import dtypes
from gemma4_moe.blocks import BLOCK_BYTES
from gemma4_moe.checking import check_layer_count, config_sizes
from gemma4_moe.checkpoints.beside import copy_side_files, write_index_file
from gemma4_moe.checkpoints.config_file import read_config
from gemma4_moe.checkpoints.side_files import check_side_file, is_side_file
from gemma4_moe.checkpoints.target import check_target
from gemma4_moe.checkpoints.transaction import Transaction
from gemma4_moe.checkpoints.writer import SafetensorsWriter
from gemma4_moe.coordination import Ranks, current
from gemma4_moe.errors import ParallelError, UnknownTensorError
from gemma4_moe.gathering import gather
from gemma4_moe.inventory import Inventory
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layouts import CHECKPOINT_RULES, DOWN, SCALE, Layout, Operation
from gemma4_moe.parallel import Placed, as_bytes, local_of, placed
from gemma4_moe.planning import DEFAULT_SHARD_SIZE, PlannedFile, PlannedTensor, layout_files, natural_key, target_dtype
from gemma4_moe.quantities import parse_size
from gemma4_moe.sharded_loading import state_of, storage_key
from gemma4_moe.sharding import part_of
from gemma4_moe.transforms import converted_shape, transposes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma4_moe.checkpoints.header import TensorEntry


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


@dataclass(slots=True)
class _Described:
    """A native tensor: whole shape, torch's name of its dtype, how it lies on which ranks, and who has it or a part."""

    shape: tuple[int, ...]
    dtype: str
    placements: str
    mesh: tuple[int, ...]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class _Target:
    """An hf tensor, the native tensor that it comes from (None for ones), and the ranks that may write it.

    Where several meshes hold the whole of a tensor, as data-parallel groups do, those are the ranks of the first.
    """

    planned: PlannedTensor
    native: str | None
    ranks: list[int]


def save_hf(
    module_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    config_from: str | Path,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: str | None = None,
    overwrite: bool = False,
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

    Raises:
        InputError: The state is not a Gemma 4 MoE model in the nemo layout, or not that of the config.
        UsageError: The target may not be written.
        StorageError: The disk or its permissions refused; the target is absent, or as it was.
        ParallelError: Ranks disagree on a tensor, or another rank failed.
    """
    ranks, target, config_from = current(), Path(path), Path(config_from)
    with ranks.together("prepare the checkpoint"):
        state = _without_tied_head(state_of(module_or_state))
        side_files = _side_files(config_from)
    called = [str(target.absolute()), str(config_from.absolute()), parse_size(max_shard_size), dtype, overwrite]
    tensors = _describe(state, ranks, called)
    with ranks.together("plan the checkpoint"):
        targets = _targets(tensors, config_from, dtype)
        files = layout_files([target.planned for target in targets.values()], parse_size(max_shard_size))
    with ExitStack() as stack:
        with ranks.together("make the target's files"):
            if ranks.is_first:
                check_target(target, config_from, overwrite=overwrite)
                transaction = stack.enter_context(Transaction(target))
                out = transaction.out
                for file in files:
                    SafetensorsWriter(out / file.name, file.header, file.size).close()
        (out, *_) = ranks.everyones(transaction.out if ranks.is_first else None)
        with ranks.together("write its tensors"):
            written = _write(state, targets, files, out, ranks.rank)
        _check_complete(ranks.everyones(written), files)
        with ranks.together("publish the checkpoint"):
            if ranks.is_first:
                copy_side_files(side_files, out)
                write_index_file({file.name: file.entries for file in files}, out)
                transaction.publish(overwrite=overwrite)
    return Saved(target, {file.name: file.size for file in files}, len(targets), written)


def _side_files(directory: Path) -> list[Path]:
    read_config(directory)
    found = sorted(entry for entry in directory.iterdir() if is_side_file(entry.name))
    for file in found:
        check_side_file(file)
    return found


def _describe(state: Mapping[str, torch.Tensor], ranks: Ranks, what: Any) -> dict[str, _Described]:
    """Return what every tensor is that any rank has; all ranks get the same.

    Raises:
        ParallelError: Ranks disagree on `what` they were called with, on a tensor, or one lacks its part of a tensor.
    """
    own = {name: _own(tensor) for name, tensor in state.items()}
    union: dict[str, _Described] = {}
    given = ranks.everyones((what, own))
    for rank, (called, described) in enumerate(given):
        if called != what:
            raise ParallelError(
                "ranks disagree on what to save",
                expected=f"{what}, as on rank {ranks.rank}",
                found=f"{called} on rank {rank}",
                hint="call with the same arguments on all ranks",
            )
        for name, (shape, dtype, placements, mesh) in described.items():
            known = union.setdefault(name, _Described(shape, dtype, placements, mesh, []))
            if (known.shape, known.dtype, known.placements) != (shape, dtype, placements):
                raise ParallelError(
                    "ranks disagree on a tensor",
                    tensor=name,
                    expected=f"{known.dtype} {list(known.shape)}, {known.placements}, as on rank {known.ranks[0]}",
                    found=f"{dtype} {list(shape)}, {placements} on rank {rank}",
                    hint="call with the state of one model on all ranks",
                )
            known.ranks.append(rank)
    for name, described in union.items():
        if absent := [rank for rank in described.mesh if rank not in described.ranks]:
            raise ParallelError(
                "a rank has no part of a tensor that it should hold a part of",
                tensor=name,
                expected=f"a part on each rank of {described.mesh}",
                found=f"none on {absent}",
                hint="call with the state of one model on all ranks",
            )
    return {name: union[name] for name in sorted(union, key=natural_key)}


def _own(tensor: torch.Tensor) -> tuple[tuple[int, ...], str, str, tuple[int, ...]]:
    """Return a tensor's whole shape, dtype, placements, and the ranks of its mesh; none for a whole tensor."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype)
    if isinstance(tensor, DTensor):
        return shape, dtype, str(tensor.placements), tuple(tensor.device_mesh.mesh.flatten().tolist())
    return shape, dtype, "whole", ()


def _without_tied_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out an output head that is the embedding itself: an hf directory has that once."""
    embeddings = {storage_key(tensor) for name, tensor in state.items() if name.endswith("embed_tokens.weight")}
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name.endswith("lm_head.weight") and storage_key(tensor) in embeddings)
    }


def _targets(tensors: Mapping[str, _Described], config_from: Path, dtype: str | None) -> dict[str, _Target]:
    """Return each hf tensor by name."""
    config = read_config(config_from)
    inventory = Inventory(Layout.NEMO, config_sizes(config))
    found: dict[str, _Target] = {}
    cast = None if dtype is None else target_dtype(dtype)
    for name, described in tensors.items():
        own = dtypes.named(described.dtype)
        into = cast if cast is not None and own.float_format is not None else own
        parsed = inventory.add(name, described.shape)
        hf, operation = (name, Operation.KEEP) if parsed is None else (parsed.hf, parsed.rule.operation)
        shape = converted_shape(operation, described.shape)
        writers = list(described.mesh) or described.ranks
        found[hf] = _Target(PlannedTensor(hf, into, shape, operation, None), name, writers)
        if parsed is not None and parsed.rule is DOWN:
            ones = parsed.sibling(SCALE).hf
            found[ones] = _Target(PlannedTensor(ones, into, shape[:1], Operation.FOLD, None), None, writers)
    if not inventory.layers:
        raise UnknownTensorError(
            "no expert tensor in the state",
            expected=f"names such as <prefix>layers.<number>.{DOWN.nemo}",
            found=f"{len(tensors)} tensors",
            hint="give a model in the nemo layout",
        )
    inventory.require_complete(CHECKPOINT_RULES[Layout.NEMO])
    check_layer_count(inventory, config)
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def _write(
    state: Mapping[str, torch.Tensor],
    targets: Mapping[str, _Target],
    files: tuple[PlannedFile, ...],
    out: Path,
    rank: int,
) -> int:
    """Write this rank's share of every tensor that it has, bring it to the device, and return its size in bytes."""
    written = 0
    for file in files:
        with SafetensorsWriter.reopen(out / file.name, file.size) as writer:
            for number, entry in enumerate(file.entries):
                target = targets[entry.name]
                mine = target.ranks[number % len(target.ranks)] == rank
                for first, rows in _rows(state, target, mine=mine) if rank in target.ranks else ():
                    raw = as_bytes(rows.cpu())
                    offset = first * (entry.nbytes // max(1, _row_count(entry)))
                    writer.write(entry.start + offset, raw.numpy().data)
                    written += raw.numel()
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


def _rows(state: Mapping[str, torch.Tensor], target: _Target, *, mine: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row, and rows in the target's layout and dtype, of every block that this rank is to write.

    A plain tensor, or a scale, is written by the one rank of which `mine` is true.
    """
    planned = target.planned
    if target.native is None:
        if mine:
            yield 0, torch.ones(planned.shape, dtype=getattr(torch, planned.dtype.name))
        return
    tensor = state.get(target.native)
    if isinstance(tensor, DTensor):
        yield from _sharded_rows(tensor, planned)
    elif tensor is not None and mine:
        local = local_of(tensor) if tensor.ndim else local_of(tensor).reshape(1)
        for first, block in _blocks(local):
            yield first, _converted(block, planned)


def _sharded_rows(tensor: DTensor, planned: PlannedTensor) -> Iterator[tuple[int, torch.Tensor]]:
    where, local = placed(tensor, planned.name), local_of(tensor)
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
        whole = gather(block.contiguous(), along, (len(block), *tensor.shape[1:]), BLOCK_BYTES)
        if number % sharers != turn:
            continue
        converted, done = _converted(whole, planned), 0
        for run in part_of(held, first, first + len(block)):
            yield run.start, converted[done : done + len(run)]
            done += len(run)


def _blocks(local: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield runs of rows of about `BLOCK_BYTES`, and the position of the first in each."""
    row_bytes = prod(local.shape[1:]) * local.element_size()
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, len(local), step):
        yield first, local[first : first + step]


def _converted(block: torch.Tensor, planned: PlannedTensor) -> torch.Tensor:
    dtype = getattr(torch, planned.dtype.name)
    if transposes(planned.operation):
        block = transpose_scale_cast(block, dtype=dtype)
    elif block.dtype != dtype:
        block = scale_cast(block, dtype=dtype)
    return block
