"""Collectives: ranks agree before any work, and shards are gathered into whole tensors.

A gather takes one dimension of the mesh after the other, and those that cut inner axes first: then the last step, which
moves most, moves whole experts. Every shard reaches its place in the result through a small staging buffer, even if all
ranks hold equally many experts: gloo would gather those into memory of its own first, as large as the result.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.distributed.placements import Placed, as_bytes, take
from gemma4_moe.distributed.ranks import failing_in_words
from gemma4_moe.distributed.sharding import count, joined, part_of
from gemma4_moe.errors import ParallelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    Runs = tuple[range, ...]

#: The same collective under its name since torch 2.13, or before.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: The most bytes of staging that a gather takes by default. More is slower on a CPU: it falls out of the caches, and
#: its pages are new to the process. See docs/benchmarks.md.
STAGING_BYTES = 16 * 2**20

#: How long a rank waits for the others to agree, in seconds.
AGREEMENT_SECONDS = 300.0


def agree(action: str, common: Any, lines: Iterable[tuple[DeviceMesh, Any]]) -> None:
    """Check that the ranks of each mesh have equal lines and an equal `common`.

    JSON can write both; `action` is a verb for the errors. A mesh without a line does not communicate.

    Raises:
        ParallelError: On all ranks if one differs; or a rank has not called within `AGREEMENT_SECONDS`.
    """
    plans: dict[DeviceMesh, list[Any]] = {}
    for mesh, line in lines:
        plans.setdefault(mesh, [common]).append(line)
    for mesh, plan in plans.items():
        _agree_on(mesh, action, json.dumps(plan, sort_keys=True, default=str))


def _agree_on(mesh: DeviceMesh, action: str, text: str) -> None:
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digest = digest.to(mesh.device_type)
    for group in mesh.get_all_groups():
        digests = digest.new_empty((dist.get_world_size(group), len(digest)))
        with failing_in_words(f"agree on what to {action}"):
            work = _ALL_GATHER(digests.view(-1), digest, group=group, async_op=True)
            work.wait(timedelta(seconds=AGREEMENT_SECONDS))
        if not bool((digests == digest).all()):
            # A rank that sees a difference tells it along the next dimensions, so that all ranks learn of it.
            digest = torch.zeros_like(digest)
    if not bool(digest.any()):
        raise ParallelError(
            f"ranks disagree on what to {action}",
            expected="the same arguments, names, shapes, placements and dtypes on all ranks",
            found=f"on rank {dist.get_rank()}: {text[:1000]}",
            hint="compare this message on all ranks, and call with the state of one model and the same arguments",
        )


def ranks_where(found: bool, meshes: Iterable[DeviceMesh]) -> list[int]:
    """Return the ranks of these meshes on which `found` is true. All their ranks must call."""
    flags = None
    for mesh in meshes:
        if flags is None:
            flags = torch.zeros(dist.get_world_size(), dtype=torch.uint8, device=mesh.device_type)
            flags[dist.get_rank()] = found
        for group in mesh.get_all_groups():
            with failing_in_words("end together"):
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return [] if flags is None else flags.nonzero().flatten().tolist()


def gather(
    local: torch.Tensor,
    where: Placed,
    shape: Sequence[int],
    staging_bytes: int = STAGING_BYTES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the whole tensor on every rank of its mesh.

    Args:
        local: This rank's shard.
        where: The tensor's mesh and placements.
        shape: The whole tensor's shape.
        staging_bytes: The most bytes of staging, unless one row on all ranks of a dimension is larger.
        out: Where to write the whole tensor: contiguous, of the shard's dtype. New memory by default.
    """
    if not where.is_cut:
        return local if out is None else out.copy_(local)
    whole = torch.empty(tuple(shape), dtype=local.dtype, device=local.device) if out is None else out
    _place(local, where.runs(shape), whole)
    gathered: set[int] = set()
    for dim in (*reversed(where.inner_dims), *reversed(where.expert_dims)):
        held = [_held(where, shape, dim, rank, gathered) for rank in range(where.mesh.size(dim))]
        _exchange(whole, held, where.mesh.get_local_rank(dim), where.mesh.get_group(dim), staging_bytes)
        gathered.add(dim)
    return whole


def broadcast(tensor: torch.Tensor, where: Placed, owner: Sequence[int]) -> None:
    """Copy a contiguous tensor of one expert in place from its owner ranks to all.

    `owner` is the owner's coordinate in each dimension of the mesh that cuts axis 0, and elsewhere any number.
    """
    for dim in where.expert_dims:
        with failing_in_words("broadcast a tensor"):
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=where.mesh.get_group(dim), group_src=owner[dim])


def _held(where: Placed, shape: Sequence[int], dim: int, rank: int, gathered: Collection[int]) -> tuple[Runs, ...]:
    """Return the runs that a rank of `dim` holds once `gathered` dimensions are gathered."""
    ranges = [range(where.mesh.size(d)) if d in gathered else [own] for d, own in enumerate(where.coordinate)]
    ranges[dim] = [rank]
    held: list[set[range]] = [set() for _ in shape]
    for ranks in product(*ranges):
        for axis, runs in enumerate(where.runs(shape, ranks)):
            held[axis].update(runs)
    return tuple(joined(sorted(runs, key=lambda run: run.start)) for runs in held)


def _exchange(whole: torch.Tensor, held: Sequence[tuple[Runs, ...]], own: int, group: Any, staging_bytes: int) -> None:
    """Exchange the values that each rank of a group holds, block by block."""
    most_rows = max(count(runs[0]) for runs in held)
    row_elements = max(prod(map(count, runs[1:])) for runs in held)
    row_bytes = max(1, row_elements * whole.element_size() * (len(held) + 1))
    step = max(1, min(most_rows, staging_bytes // row_bytes))
    staging = whole.new_empty((len(held), step * row_elements))
    send = whole.new_empty(step * row_elements)
    for first in range(0, most_rows, step):
        blocks = [(part_of(runs[0], first, first + step), *runs[1:]) for runs in held]
        mine = take(whole, blocks[own])
        send[: mine.numel()].view(mine.shape).copy_(mine)
        with failing_in_words("gather a tensor"):  # as bytes, which every backend can move, whatever the dtype
            _ALL_GATHER(as_bytes(staging), as_bytes(send), group)
        for rank, block in enumerate(blocks):
            if rank != own:
                sizes = [count(runs) for runs in block]
                _place(staging[rank, : prod(sizes)].view(sizes), block, whole)


def _place(values: torch.Tensor, runs: Sequence[Runs], whole: torch.Tensor) -> None:
    """Copy values into `whole` at `runs` of each axis: the inverse of `take`."""
    for axis, own in enumerate(runs):
        if len(own) != 1:
            for run, piece in zip(own, torch.split(values, [len(run) for run in own], axis), strict=True):
                _place(piece, [*runs[:axis], (run,), *runs[axis + 1 :]], whole)
            return
    whole[tuple(slice(own[0].start, own[0].stop) for own in runs)].copy_(values)
