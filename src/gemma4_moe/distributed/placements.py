"""Meshes and DTensors: what a placement becomes in the other layout, and a rank's own part of a tensor.

Nothing here communicates. Placements decide, never the names of a mesh's dimensions; only where a plain tensor is to be
sharded, and so has no placements, do the names `ep` and `ep_shard` that NeMo AutoModel gives them say how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from gemma4_moe.distributed.sharding import NAMED_DIMENSIONS, Placement, Sharded, count, local_runs
from gemma4_moe.errors import ParallelError
from gemma4_moe.layout.table import converted_axis, converted_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.layout.table import Operation

#: Dimensions that are no part of one layer: a pipeline stage holds its own layers.
_OUTSIDE = frozenset({"pp"})


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the parts of a tensor are.

    Attributes:
        mesh: The ranks.
        placements: What each dimension of the mesh does to the tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def converted(self, operation: Operation, ndim: int) -> Placed:
        """Return where the parts are on the other side of `operation`: on the same ranks."""
        return Placed(
            self.mesh,
            tuple(
                None if p is None else Sharded(converted_axis(operation, p.axis, ndim), p.split_factor)
                for p in self.placements
            ),
        )

    def of_experts(self) -> Placed:
        """Return where the parts of a tensor [E] are that goes with one whose axis 0 is E."""
        return Placed(self.mesh, tuple(p if p is not None and p.axis == 0 else None for p in self.placements))

    def runs(self, shape: Sequence[int], coordinate: Sequence[int] | None = None) -> tuple[tuple[range, ...], ...]:
        """Return, for each axis of a tensor of `shape`, the indices that a rank holds; this rank by default.

        Raises:
            ParallelError: This rank is not in the mesh.
        """
        if coordinate is None:
            coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ParallelError(
                "this rank is not in the tensor's mesh",
                expected="a rank of the mesh",
                found=str(self.mesh),
                hint="call on the mesh's ranks alone",
            )
        mesh_shape = tuple(self.mesh.shape)
        return tuple(local_runs(size, axis, mesh_shape, coordinate, self.placements) for axis, size in enumerate(shape))

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of this rank's part of a tensor of `shape`."""
        return tuple(map(count, self.runs(shape)))

    def wrap(self, local: torch.Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> DTensor:
        """Return this rank's part as a DTensor of the given global shape, without asking other ranks.

        Args:
            local: The part.
            shape: The whole tensor's shape.
            stride: The whole tensor's stride; that of a contiguous tensor by default.
        """
        whole = torch.Size(shape)
        return DTensor.from_local(
            local,
            self.mesh,
            [_torch_placement(placement) for placement in self.placements],
            run_check=False,
            shape=whole,
            stride=tuple(stride) if stride is not None else torch.empty(whole, device="meta").stride(),
        )


def placed(tensor: DTensor, name: str) -> Placed:
    """Return where the parts of a DTensor are.

    Raises:
        ParallelError: A placement that is neither Shard, _StridedShard nor Replicate; or the local part does not have
            the size that the placements give it.
    """
    found = Placed(tensor.device_mesh, tuple(_placement(p, name) for p in tensor.placements))
    local = tuple(local_of(tensor).shape)
    if local != found.local_shape(tensor.shape):
        raise ParallelError(
            "a DTensor whose local part is not what its placements say",
            tensor=name,
            expected=list(found.local_shape(tensor.shape)),
            found=f"{list(local)} with {tensor.placements}",
            hint="make the DTensor with explicit shape and stride, or with distribute_tensor",
        )
    return found


def expert_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return the part of a mesh over which the experts of one pipeline stage are sharded, None for a single rank."""
    names = None if mesh is None else mesh.mesh_dim_names
    if mesh is not None and names is not None and _OUTSIDE & set(names):
        inner = tuple(name for name in names if name not in _OUTSIDE)
        mesh = mesh[inner] if inner else None
    return None if mesh is None or mesh.size() == 1 else mesh


def placed_on(mesh: DeviceMesh, name: str) -> Placed:
    """Return where the parts of a native expert tensor belong on a mesh, by the names of its dimensions.

    Raises:
        ParallelError: A dimension has no name, or one that says nothing about experts.
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
    """Return this rank's part of a DTensor, or a plain tensor, outside of any graph; the storage is shared."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole_shape(
    shape: tuple[int, ...], axes: Sequence[str], sizes: Mapping[str, int], where: Placed, name: str
) -> tuple[int, ...]:
    """Return the shape of the tensor that a plain tensor beside a mesh is, or is this rank's part of.

    Args:
        shape: The plain tensor's own shape.
        axes: What its axes are.
        sizes: What is known of E, H and I.
        where: How the mesh shards such a tensor.
        name: Its name.

    Returns:
        `shape` itself for a whole tensor, and for one that is neither: whoever checks shapes will say so.

    Raises:
        ParallelError: An axis that the mesh shards has a size that is not known, so that nothing tells a part from
            the whole.
    """
    known = [2 * sizes["I"] if axis == "2I" and "I" in sizes else sizes.get(axis) for axis in axes]
    sharded = {placement.axis for placement in where.placements if placement is not None}
    if len(shape) != len(axes) or shape == tuple(known):
        return shape
    for axis in sharded & set(range(len(axes))):
        if known[axis] is None:
            raise ParallelError(
                "nothing tells whether a plain tensor beside a mesh is whole or a part",
                tensor=name,
                expected=f"the size of {axes[axis]} from config or moe_config",
                found=list(shape),
                hint="give the adapter the model's config, or give the tensor as a DTensor",
            )
    whole = tuple(own if size is None else size for own, size in zip(shape, known, strict=True))
    return whole if where.local_shape(whole) == shape else shape


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in order as flat bytes; a view where they lie so already."""
    whole = tensor.contiguous()
    # A tensor of one element counts as contiguous whatever its stride; bytes can only be seen through stride one.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def take(value: Any, runs: Sequence[Sequence[range]]) -> torch.Tensor:
    """Return the part of a tensor, or of a lazy slice, at `runs` of each axis: a view where that is possible."""
    for axis in range(len(runs)):
        if len(runs[axis]) > 1:
            return torch.cat([take(value, [*runs[:axis], [run], *runs[axis + 1 :]]) for run in runs[axis]], axis)
    part: torch.Tensor = value[tuple(slice(own[0].start, own[0].stop) if own else slice(0, 0) for own in runs)]
    return part.detach()


def convert_view(tensor: DTensor, operation: Operation, name: str) -> DTensor:
    """Return a DTensor's view on the other side of an operation that only exchanges axes. No data moves."""
    where = placed(tensor, name).converted(operation, tensor.ndim)
    shape = converted_shape(operation, tuple(tensor.shape))
    stride = converted_shape(operation, tuple(tensor.stride()))
    local = local_of(tensor)
    return where.wrap(local if shape == tuple(tensor.shape) else local.transpose(-1, -2), shape, stride)


def _placement(placement: TorchPlacement, name: str) -> Placement:
    # _StridedShard is no subclass of Shard.
    if isinstance(placement, _StridedShard):
        return Sharded(placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Sharded(placement.dim)
    if isinstance(placement, Replicate):
        return None
    raise ParallelError(
        "a placement that can't be converted",
        tensor=name,
        expected="Shard, _StridedShard or Replicate on each dimension of the mesh",
        found=repr(placement),
        hint="redistribute the tensor first",
    )


def _torch_placement(placement: Placement) -> TorchPlacement:
    if placement is None:
        return Replicate()
    if placement.split_factor == 1:
        return Shard(placement.axis)
    return _StridedShard(placement.axis, split_factor=placement.split_factor)
