"""Checks of a stream on each of several ranks: every placement gives the stream of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed.placement_checks import CASES, shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import ParallelError
from gemma4_moe.refit import WeightStream, broadcasting
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import assert_same_stream, in_order, per_expert

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

BF16, FP32 = torch.bfloat16, torch.float32
#: Experts, hidden size, inner size: uneven on every axis; for 4 ranks with fewer experts than ranks, too.
SIZES = {2: [(5, 9, 7)], 4: [(6, 10, 7), (3, 4, 5)]}
#: With axis 2 cut, gate and up lie on different ranks.
INNER: dict[int, tuple[tuple[int, ...], tuple[Placement, ...], None]] = {
    2: ((2,), (Shard(2),), None),
    4: ((2, 2), (Shard(2), Shard(0)), None),
}


def check_streams(world: int) -> None:
    for mesh_shape, placements, names in [*CASES[world], INNER[world]]:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for sizes in SIZES[world]:
            check_stream(mesh, placements, sizes, *((FP32, BF16) if sizes[0] == 5 else (BF16, None)))


def check_stream(
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    cast: torch.dtype | None,
) -> None:
    experts, hidden, inner = sizes
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(experts, hidden, inner), None)
    nemo = nemo_from_hf(random_hf_state_dict(layers=2, E=experts, H=hidden, I=inner, dtype=dtype))
    fused = {name: tensor.to(cast or dtype) for name, tensor in in_order(nemo, layers=2).items()}
    state = shard(nemo, mesh, placements)
    name = "model.language_model.embed_tokens.weight"
    state[name] = distribute_tensor(nemo[name], mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
    largest = max(tensor.nbytes for tensor in fused.values())
    for mode, expected in (("fused", list(fused.items())), ("per-expert", per_expert(fused))):
        arguments: dict[str, Any] = {"experts": mode, "dtype": cast, "bucket_bytes": largest}
        stream = WeightStream(adapter, state, **arguments)
        assert_same_stream(stream, expected)
        assert_same_stream([(n, t.clone()) for b in stream.buckets() for n, t in b.tensors()], expected)
        last = dist.get_world_size() - 1
        to_last = WeightStream(adapter, state, dst=last, **arguments)
        assert_same_stream(to_last, expected if dist.get_rank() == last else [])
        found = [(n, t.clone()) for bucket in to_last.buckets() for n, t in bucket.tensors()]
        assert_same_stream(found, expected if dist.get_rank() == last else [])


def check_disagreement() -> None:
    """Ranks that differ in what they are about to send fail together, before the first tensor."""
    mesh = init_device_mesh("cpu", (2,))
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(6, 10, 7), None)
    nemo = shard(nemo_from_hf(random_hf_state_dict(layers=2)), mesh, (Shard(0),))
    rank = dist.get_rank()
    for arguments in ({"dtype": [BF16, FP32][rank]}, {"layers": [[0], [1]][rank]}, {"bucket_bytes": 2**20 + rank}):
        with pytest.raises(ParallelError, match="ranks disagree"):
            next(WeightStream(adapter, nemo, **arguments).buckets())
    other = shard(nemo_from_hf(random_hf_state_dict(layers=2)), mesh, (Shard(rank),))
    with pytest.raises(ParallelError, match="ranks disagree"):
        next(iter(WeightStream(adapter, other)))


def check_broadcast() -> None:
    """Two trainer ranks share the experts; the second of them feeds a receiver."""
    rank = dist.get_rank()
    trainers = DeviceMesh("cpu", [0, 1])
    group = dist.new_group([1, 2])
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(6, 10, 7), None)
    nemo = nemo_from_hf(random_hf_state_dict(layers=2))
    if rank < 2:
        stream = WeightStream(adapter, shard(nemo, trainers, (Shard(0),)), bucket_bytes=1680, dst=1)
        for _ in range(2):
            broadcasting.send(stream, group)
        return
    for _ in range(2):
        found = [(name, tensor.clone()) for name, tensor in broadcasting.receive(1, group=group)]
        assert_same_stream(found, in_order(nemo, layers=2).items())
