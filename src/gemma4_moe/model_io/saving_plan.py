"""What `save_hf` will write, agreed on by all ranks: each tensor described once, and what it becomes in hf layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from gemma4_moe.checkpoint.config import read_config
from gemma4_moe.checkpoint.recognition import check_layer_count
from gemma4_moe.errors import ParallelError, UnknownTensorError
from gemma4_moe.layout.dtypes import DType, named, target_dtype
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import natural_key
from gemma4_moe.layout.table import CHECKPOINT_RULES, DOWN, Layout
from gemma4_moe.layout.targets import Target, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from gemma4_moe.distributed.ranks import Ranks


@dataclass(slots=True)
class Native:
    """A native tensor as all ranks see it.

    Attributes:
        name: Its name.
        shape: Its whole shape.
        dtype: Its dtype.
        placements: Its placements, as text.
        mesh: The ranks of its mesh; none for a plain tensor.
        ranks: The ranks that have it, or a part of it.
    """

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


def describe(state: Mapping[str, torch.Tensor], ranks: Ranks, what: Any) -> dict[str, Native]:
    """Return every tensor that any rank has, by name; all ranks get the same.

    Raises:
        ParallelError: Ranks disagree on `what` they were called with, on a tensor, or one lacks its part of a tensor.
    """
    own = {name: _own(tensor) for name, tensor in state.items()}
    union: dict[str, Native] = {}
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
            known = union.setdefault(name, Native(name, shape, named(dtype), placements, mesh, []))
            if (known.shape, known.dtype, known.placements) != (shape, named(dtype), placements):
                raise ParallelError(
                    "ranks disagree on a tensor",
                    tensor=name,
                    expected=f"{known} as on rank {known.ranks[0]}",
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


def make_targets(tensors: Mapping[str, Native], config_from: Path, dtype: str | None) -> dict[str, Target[Native]]:
    """Return every tensor of the checkpoint by name.

    Raises:
        UnknownTensorError: There is no expert tensor; or see `targets_of`.
        DuplicateTensorError, TensorShapeError, IncompleteExpertsError: See `targets_of`.
        ConfigError, IncompleteExpertsError: The layers are not those that the config counts.
    """
    config = read_config(config_from)
    inventory = Inventory(Layout.NEMO, config.sizes)
    cast = None if dtype is None else target_dtype(dtype)
    targets = targets_of(tensors.values(), inventory, CHECKPOINT_RULES[Layout.NEMO], cast)
    if not inventory.layers:
        raise UnknownTensorError(
            "no expert tensor in the state",
            expected=f"names such as <prefix>layers.<number>.{DOWN.nemo}",
            found=f"{len(tensors)} tensors",
            hint="give a model in the nemo layout",
        )
    check_layer_count(inventory, config)
    return targets
