"""Meshes and DTensors: a tensor's placements in the other layout, and a rank's own shard.

Nothing here communicates. A DTensor's placements decide, never the names of its mesh's dimensions. A plain tensor has
no placements: the names that NeMo AutoModel gives to dimensions, such as `ep` and `ep_shard`, say how to shard it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from gemma4_moe.distributed.sharding import NAMED_DIMENSIONS, Placement, Sharded, count, local_runs
from gemma4_moe.errors import ParallelError
from gemma4_moe.layout.table import Operation, converted_axis, converted_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

#: The dimension that shards no single layer: a pipeline stage holds whole layers of its own.
_OUTSIDE = "pp"


@dataclass(frozen=True, slots=True)
class Placed:
    """The mesh of a sharded tensor, and the placement of each dimension of the mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def expert_dims(self) -> list[int]:
        """The mesh dimensions of several ranks that cut axis 0."""
        return [dim for dim, p in enumerate(self.placements) if p and p.axis == 0 and self.mesh.size(dim) > 1]

    @property
    def inner_dims(self) -> list[int]:
        """The mesh dimensions of several ranks that cut an axis other than 0."""
        return [dim for dim, p in enumerate(self.placements) if p and p.axis != 0 and self.mesh.size(dim) > 1]

    @property
    def is_cut(self) -> bool:
        """Whether the ranks hold different shards. If not, each rank holds the whole tensor."""
        return bool(self.expert_dims or self.inner_dims)

    @property
    def coordinate(self) -> Sequence[int]:
        """This rank's place in each dimension of the mesh."""
        found = self.mesh.get_coordinate()
        if found is None:
            raise ParallelError("this rank is not in the tensor's mesh", found=self.mesh, hint="call on its ranks only")
        return found

    def converted(self, operation: Operation, ndim: int) -> Placed:
        """Return the placements after `operation` on a tensor of `ndim` axes; no shard moves."""
        moved = (p and Sharded(converted_axis(operation, p.axis, ndim), p.split_factor) for p in self.placements)
        return Placed(self.mesh, tuple(moved))

    def of_experts(self) -> Placed:
        """Return the placement of a per-expert vector [E] that belongs to this tensor."""
        return Placed(self.mesh, tuple(p if p and p.axis == 0 else None for p in self.placements))

    def runs(self, shape: Sequence[int], coordinate: Sequence[int] | None = None) -> tuple[tuple[range, ...], ...]:
        """Return the indices of each axis that a rank, by default this one, holds."""
        coordinate, mesh_shape = self.coordinate if coordinate is None else coordinate, tuple(self.mesh.shape)
        return tuple(local_runs(size, axis, mesh_shape, coordinate, self.placements) for axis, size in enumerate(shape))

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of this rank's shard of a tensor of `shape`."""
        return _local_shape(tuple(shape), tuple(self.mesh.shape), tuple(self.coordinate), self.placements)

    def wrap(self, local: torch.Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> DTensor:
        """Return this rank's shard as a DTensor of this whole shape, by default contiguous."""
        whole, placements = torch.Size(shape), [_torch_placement(placement) for placement in self.placements]
        stride = torch.empty(whole, device="meta").stride() if stride is None else tuple(stride)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=whole, stride=stride)


def placed(tensor: DTensor, name: str) -> Placed:
    """Return the mesh and placements of a DTensor called `name`.

    Raises:
        ParallelError: A placement is not known; or the local shard does not have the size that the placements give it.
    """
    for placement in tensor.placements:
        _require_known(placement, name)
    found = Placed(tensor.device_mesh, _placements_of(tuple(tensor.placements)))
    local = tuple(local_of(tensor).shape)
    if local != found.local_shape(tensor.shape):
        raise ParallelError(
            "a DTensor whose local shard does not have the shape that its placements give it",
            tensor=name,
            expected=list(found.local_shape(tensor.shape)),
            found=f"{list(local)} with {tensor.placements}",
            hint="make the DTensor with explicit shape and stride, or with distribute_tensor",
        )
    return found


def expert_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return the submesh that shards one pipeline stage's experts; None for a single rank."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is not None and _OUTSIDE in names:
        inner = tuple(name for name in names if name != _OUTSIDE)
        mesh = mesh[inner] if inner else None
    return None if mesh is None or mesh.size() == 1 else mesh


def placed_on(mesh: DeviceMesh, name: str) -> Placed:
    """Return a native expert tensor's placements by the names of a mesh's dimensions.

    Raises:
        ParallelError: A dimension has no name, or one that is not in `NAMED_DIMENSIONS`.
    """
    names = mesh.mesh_dim_names
    if names is None or not set(names) <= NAMED_DIMENSIONS.keys():
        raise ParallelError(
            "a mesh that does not say how experts are sharded over it",
            tensor=name,
            expected=f"dimensions named {', '.join(NAMED_DIMENSIONS)}",
            found=f"dimensions {names}",
            hint="give the mesh of the experts, or the tensors as DTensors",
        )
    return Placed(mesh, tuple(NAMED_DIMENSIONS[n] for n in names))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor, as a detached view."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if not torch.is_grad_enabled():
        return tensor.to_local()
    with torch.no_grad():  # with gradients to_local takes five times as long
        return tensor.to_local().detach()


def whole_shape(
    shape: tuple[int, ...], axes: Sequence[str], sizes: Mapping[str, int], where: Placed, name: str
) -> tuple[int, ...]:
    """Return the whole shape of a plain tensor that may be a shard.

    A tensor that is neither whole nor a shard keeps its shape, which the check of shapes then refuses. `axes` are the
    letters of its axes, such as ("E", "H", "2I"), `sizes` the known sizes of E, H and I, `where` its placements.

    Raises:
        ParallelError: The size of an axis that the mesh shards is not known.
    """
    known = [2 * sizes["I"] if axis == "2I" and "I" in sizes else sizes.get(axis) for axis in axes]
    if len(shape) != len(axes) or shape == tuple(known):
        return shape
    for axis in {p.axis for p in where.placements if p}:
        if known[axis] is None:
            raise ParallelError(
                "nothing tells whether a plain tensor given with a mesh is whole or a shard",
                tensor=name,
                expected=f"the size of {axes[axis]} from config or moe_config",
                found=list(shape),
                hint="give the adapter the model's config, or give the tensor as a DTensor",
            )
    whole = tuple(own if size is None else size for own, size in zip(shape, known, strict=True))
    return whole if where.local_shape(whole) == shape else shape


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in order as flat bytes; a view of a contiguous tensor."""
    whole = tensor.contiguous()
    # A tensor of one element counts as contiguous whatever its stride, and only stride one can be viewed as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def take(value: Any, runs: Sequence[Sequence[range]]) -> torch.Tensor:
    """Return a tensor's, or a lazy slice's, values at `runs` of each axis."""
    for axis in range(len(runs)):
        if len(runs[axis]) > 1:
            return torch.cat([take(value, [*runs[:axis], [run], *runs[axis + 1 :]]) for run in runs[axis]], axis)
    part: torch.Tensor = value[tuple(slice(own[0].start, own[0].stop) if own else slice(0, 0) for own in runs)]
    return part.detach()


def transposed_view(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a view with the last two axes exchanged; for a DTensor a DTensor."""
    view = local_of(tensor).transpose(-1, -2)
    if not isinstance(tensor, DTensor):
        return view
    where = placed(tensor, name).converted(Operation.TRANSPOSE, tensor.ndim)
    shape, stride = (converted_shape(Operation.TRANSPOSE, tuple(sizes)) for sizes in (tensor.shape, tensor.stride()))
    return where.wrap(view, shape, stride)


#: Placements and shapes are those of a few tensors of each layer, and are asked for in every pass. No mesh is
#: remembered: one of another process group may be equal to it.
_remembered = lru_cache(maxsize=1024)


@_remembered
def _placements_of(placements: tuple[TorchPlacement, ...]) -> tuple[Placement, ...]:
    return tuple(map(_placement, placements))


@_remembered
def _local_shape(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    return tuple(count(local_runs(size, axis, mesh_shape, coordinate, placements)) for axis, size in enumerate(shape))


def _placement(placement: TorchPlacement) -> Placement:
    if isinstance(placement, Shard | _StridedShard):
        return Sharded(placement.dim, getattr(placement, "split_factor", 1))
    return None


def _require_known(placement: TorchPlacement, name: str) -> None:
    if not isinstance(placement, Shard | _StridedShard | Replicate):  # a strided one is no subclass of Shard
        raise ParallelError(
            "a placement that can't be converted",
            tensor=name,
            expected="Shard, _StridedShard or Replicate on each dimension of the mesh",
            found=repr(placement),
            hint="redistribute the tensor to one of these first",
        )


def _torch_placement(placement: Placement) -> TorchPlacement:
    if placement is None:
        return Replicate()
    axis, factor = placement.axis, placement.split_factor
    return Shard(axis) if factor == 1 else _StridedShard(axis, split_factor=factor)
