"""What `save_hf` will write, agreed on by all ranks: each tensor described once, and what it becomes in hf layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from gemma4_moe.checkpoint.config import read_config
from gemma4_moe.checkpoint.recognition import check_layer_count, config_sizes
from gemma4_moe.converter.plan import PlannedTensor
from gemma4_moe.errors import ParallelError, UnknownTensorError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.dtypes import target_dtype
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import natural_key
from gemma4_moe.layout.table import CHECKPOINT_RULES, DOWN, SCALE, Layout, Operation, converted_shape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from gemma4_moe.distributed.ranks import Ranks


@dataclass(slots=True)
class Described:
    """A native tensor: whole shape, torch's name of its dtype, how it lies on which ranks, and who has it or a part."""

    shape: tuple[int, ...]
    dtype: str
    placements: str
    mesh: tuple[int, ...]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Target:
    """An hf tensor, the native tensor that it comes from (None for ones), and the ranks that may write it.

    Where several meshes hold the whole of a tensor, as data-parallel groups do, those are the ranks of the first.
    """

    planned: PlannedTensor
    native: str | None
    ranks: list[int]


def describe(state: Mapping[str, torch.Tensor], ranks: Ranks, what: Any) -> dict[str, Described]:
    """Return what every tensor is that any rank has; all ranks get the same.

    Raises:
        ParallelError: Ranks disagree on `what` they were called with, on a tensor, or one lacks its part of a tensor.
    """
    own = {name: _own(tensor) for name, tensor in state.items()}
    union: dict[str, Described] = {}
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
            known = union.setdefault(name, Described(shape, dtype, placements, mesh, []))
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


def make_targets(tensors: Mapping[str, Described], config_from: Path, dtype: str | None) -> dict[str, Target]:
    """Return each hf tensor by name."""
    config = read_config(config_from)
    inventory = Inventory(Layout.NEMO, config_sizes(config))
    found: dict[str, Target] = {}
    cast = None if dtype is None else target_dtype(dtype)
    for name, described in tensors.items():
        into = dtypes.cast_to(dtypes.named(described.dtype), cast)
        parsed = inventory.add(name, described.shape)
        hf, operation = (name, Operation.KEEP) if parsed is None else (parsed.hf, parsed.rule.operation)
        shape = converted_shape(operation, described.shape)
        writers = list(described.mesh) or described.ranks
        found[hf] = Target(PlannedTensor(hf, into, shape, operation, None), name, writers)
        if parsed is not None and parsed.rule is DOWN:
            ones = parsed.sibling(SCALE).hf
            found[ones] = Target(PlannedTensor(ones, into, shape[:1], Operation.FOLD, None), None, writers)
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
