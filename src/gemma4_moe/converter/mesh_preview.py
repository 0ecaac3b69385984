"""The share of each rank of a mesh, from a plan alone: no torch, and no process but this one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from gemma4_moe.converter.blocks import BLOCK_BYTES
from gemma4_moe.distributed.sharding import NAMED_DIMENSIONS, count, local_runs
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.table import Layout, transposes
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.converter.plan import Plan, PlannedTensor
    from gemma4_moe.distributed.sharding import Placement

#: More ranks than any such run has; a mistyped mesh should not take minutes.
MOST_RANKS = 2**16


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one rank.

    Attributes:
        coordinate: The rank's place in the mesh.
        expert_bytes: Bytes of expert tensors that it holds.
        experts: Experts of a layer of which it holds at least a part.
        read_bytes: Bytes of the source's expert tensors and scales that it reads: its experts whole, since `ep_shard`
            cuts the innermost axis of the file.
    """

    coordinate: tuple[int, ...]
    expert_bytes: int
    experts: int
    read_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Prediction:
    """The shares of all ranks of a mesh that loads a plan's source.

    Attributes:
        mesh: Ranks along each dimension, by name.
        shares: One for each rank, in the order of ranks.
        other_bytes: Bytes of all tensors that are not experts; a rank that shards them too holds less.
        staging_bytes: Bytes that a load needs besides the model: one block, or one row of the source if that is larger.
    """

    mesh: Mapping[str, int]
    shares: tuple[Share, ...]
    other_bytes: int
    staging_bytes: int

    def __repr__(self) -> str:
        mesh = ", ".join(f"{name} {ranks}" for name, ranks in self.mesh.items())
        return (
            f"<Prediction for {mesh}: {len(self.shares)} ranks, {format_size(self.peak_bytes)} at the peak of a load>"
        )

    @property
    def balance(self) -> float:
        """The largest share of expert bytes over the mean; 1.0 is even."""
        mean = sum(share.expert_bytes for share in self.shares) / len(self.shares)
        return max(share.expert_bytes for share in self.shares) / mean

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank in bytes: its experts, all other tensors, and the staging of a load."""
        return max(share.expert_bytes for share in self.shares) + self.other_bytes + self.staging_bytes


def parse_mesh(given: Mapping[str, int] | str) -> dict[str, int]:
    """Return ranks by dimension from such a mapping, or from text such as "ep_shard=2,ep=8".

    Raises:
        UsageError: It is not a mesh, it is too large, or a dimension has no meaning for experts.
    """
    text = given if isinstance(given, str) else ",".join(f"{name}={ranks}" for name, ranks in given.items())
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, ranks = part.strip().partition("=")
        if name in mesh or name not in NAMED_DIMENSIONS or not ranks.isascii() or not ranks.isdecimal():
            raise UsageError(
                "not a mesh",
                expected=f"such as ep_shard=2,ep=8, with dimensions of {', '.join(NAMED_DIMENSIONS)}",
                found=text,
                hint="name each dimension once, with its number of ranks",
            )
        mesh[name] = int(ranks)
    if not 0 < math.prod(mesh.values()) <= MOST_RANKS:
        raise UsageError(
            "not a mesh", expected=f"1 to {MOST_RANKS} ranks", found=text, hint="give the ranks of one pipeline stage"
        )
    return mesh


def predict(plan: Plan, mesh: Mapping[str, int]) -> Prediction:
    """Return the share of each rank that loads the plan's source into the nemo layout.

    Raises:
        UsageError: The plan's target is not in the nemo layout.
    """
    if plan.target_layout is not Layout.NEMO:
        raise UsageError(
            "a mesh holds the nemo layout",
            expected="a source in the hf layout",
            found=f"a source in the {plan.source_layout} layout",
            hint="leave the mesh out, or give a source in the hf layout",
        )
    placements = tuple(NAMED_DIMENSIONS[name] for name in mesh)
    experts = [tensor for tensor in plan.tensors.values() if transposes(tensor.operation)]
    shapes = tuple(mesh.values())
    shares = tuple(
        _share(coordinate, experts, shapes, placements) for coordinate in product(*(range(ranks) for ranks in shapes))
    )
    every = sum(entry.nbytes for file in plan.files for entry in file.entries)
    return Prediction(
        mesh=dict(mesh),
        shares=shares,
        other_bytes=every - sum(_nbytes(tensor, tensor.shape) for tensor in experts),
        staging_bytes=load_staging_bytes(plan.tensors.values()),
    )


def _share(
    coordinate: tuple[int, ...],
    experts: list[PlannedTensor],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> Share:
    held = [_held(tensor, coordinate, mesh_shape, placements) for tensor in experts]
    rows = max((shape[0] for shape in held), default=0)
    read = 0
    for tensor, shape in zip(experts, held, strict=True):
        assert tensor.source is not None, "an expert tensor has a source"
        row_bytes = tensor.source.nbytes // tensor.source.shape[0]
        scale_bytes = 0 if tensor.scale is None else tensor.scale.nbytes
        read += shape[0] * row_bytes + scale_bytes if all(shape) else 0
    return Share(
        coordinate=coordinate,
        expert_bytes=sum(_nbytes(tensor, shape) for tensor, shape in zip(experts, held, strict=True)),
        experts=rows,
        read_bytes=read,
    )


def _held(
    tensor: PlannedTensor, coordinate: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    return tuple(
        count(local_runs(size, axis, mesh_shape, coordinate, placements)) for axis, size in enumerate(tensor.shape)
    )


def _nbytes(tensor: PlannedTensor, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * tensor.dtype.itemsize


def source_row_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes of the file for one index of a native tensor's first axis; of a scalar, all of it."""
    assert tensor.source is not None, "every nemo tensor comes from an hf tensor"
    return tensor.source.nbytes // max(1, tensor.source.shape[0] if tensor.source.shape else 1)


def load_staging_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """Return the bytes that a load needs besides the model; they follow from the file's dtypes alone."""
    return max([BLOCK_BYTES, *map(source_row_bytes, tensors)])
