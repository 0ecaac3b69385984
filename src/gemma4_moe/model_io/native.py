"""The native tensors of a model as all ranks see them, from names, shapes, dtypes and placements alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from gemma4_moe.errors import ParallelError
from gemma4_moe.layout.dtypes import DType, named
from gemma4_moe.layout.names import natural_key
from gemma4_moe.model_io.load import storage_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


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


def without_tied_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out an output head that is the embedding itself: an hf directory has that once."""
    embeddings = {storage_key(tensor) for name, tensor in state.items() if name.endswith("embed_tokens.weight")}
    tied = {name for name, t in state.items() if name.endswith("lm_head.weight") and storage_key(t) in embeddings}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def describe(state: Mapping[str, torch.Tensor], rank: int) -> list[Native]:
    """Return the tensors that a rank has or has a part of."""
    found = []
    for name, tensor in state.items():
        placements, mesh = "whole", ()
        if isinstance(tensor, DTensor):
            placements, mesh = str(tensor.placements), tuple(tensor.device_mesh.mesh.flatten().tolist())
        found.append(Native(name, tuple(tensor.shape), named(str(tensor.dtype)), placements, mesh, [rank]))
    return found


def union_of(given: Sequence[tuple[list[object], list[Native]]]) -> dict[str, Native]:
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
