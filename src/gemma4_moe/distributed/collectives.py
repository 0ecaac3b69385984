"""Collectives before and after the work: ranks agree on it, and tell each other how it ended."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.distributed.ranks import failing_in_words
from gemma4_moe.errors import ParallelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.device_mesh import DeviceMesh

    Ranks = tuple[str, tuple[int, ...], tuple[int, ...]]

#: The same collective under its name since torch 2.13, or before.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: How long a rank waits for the others to agree, in seconds.
AGREEMENT_SECONDS = 300.0


def agree(action: str, common: Any, lines: Iterable[tuple[DeviceMesh, Any]]) -> None:
    """Check that the ranks of each mesh have equal lines and an equal `common`.

    JSON can write both; `action` is a verb for the errors. A mesh without a line does not communicate.

    Raises:
        ParallelError: On all ranks if one differs; or a rank has not called within `AGREEMENT_SECONDS`.
    """
    plans: dict[Ranks, tuple[DeviceMesh, list[Any]]] = {}
    for mesh, line in lines:
        plans.setdefault(_ranks_of(mesh), (mesh, [common]))[1].append(line)
    for mesh, plan in plans.values():
        _agree_on(mesh, action, json.dumps(plan, sort_keys=True, default=str))


def digests(lines: Iterable[tuple[DeviceMesh | None, Any]]) -> list[tuple[DeviceMesh, str]]:
    """Return each mesh of the lines with a digest of what JSON writes of them, for `agree`."""
    found: dict[DeviceMesh, Any] = {}
    for mesh, line in lines:
        if mesh is not None:
            found.setdefault(mesh, hashlib.sha256()).update(json.dumps(line).encode())
    return [(mesh, digest.hexdigest()) for mesh, digest in found.items()]


def _agree_on(mesh: DeviceMesh, action: str, text: str) -> None:
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digest = digest.to(mesh.device_type)
    for group in _groups_of(mesh):
        digests = digest.new_empty((dist.get_world_size(group), len(digest)))
        with failing_in_words(f"agree on what to {action}"):
            work = ALL_GATHER(digests.view(-1), digest, group=group, async_op=True)
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


@lru_cache(maxsize=64)
def _ranks_of(mesh: DeviceMesh) -> Ranks:
    """Return what meshes of the same ranks in the same order have in common, dimensions of one rank left out."""
    return mesh.device_type, tuple(size for size in mesh.shape if size > 1), tuple(mesh.mesh.flatten().tolist())


def _groups_of(mesh: DeviceMesh) -> list[Any]:
    """Return the group of each dimension of several ranks."""
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def ranks_where(found: bool, meshes: Iterable[DeviceMesh]) -> list[int]:
    """Return the ranks of these meshes on which `found` is true. All their ranks must call, in `AGREEMENT_SECONDS`."""
    flags = None
    for mesh in {_ranks_of(mesh): mesh for mesh in meshes}.values():
        if flags is None:
            flags = torch.zeros(dist.get_world_size(), dtype=torch.uint8, device=mesh.device_type)
            flags[dist.get_rank()] = found
        for group in _groups_of(mesh):
            with failing_in_words("end together"):
                work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=group, async_op=True)
                work.wait(timedelta(seconds=AGREEMENT_SECONDS))
    return [] if flags is None else flags.nonzero().flatten().tolist()
