"""Checks on ranks that disagree, stay away or die: the others end soon, with an error that names the logs to read."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from distributed.placement_checks import shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.distributed import collectives
from gemma4_moe.errors import ParallelError
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict


def model(world: int) -> dict[str, torch.Tensor]:
    return shard(nemo_from_hf(random_hf_state_dict()), init_device_mesh("cpu", (world,)), (Shard(0),))


def adapter() -> Gemma4MoEStateDictAdapter:
    return Gemma4MoEStateDictAdapter(None, MoEConfig(6), None, dtype=torch.bfloat16)


def disagree(world: int) -> None:
    """One rank leaves a layer out: every rank raises, not only those that see the difference first."""
    state = model(world)
    mesh = init_device_mesh("cpu", (2, world // 2))
    square = shard(nemo_from_hf(random_hf_state_dict()), mesh, (Shard(1), Shard(0)))
    for given in (state, square):
        mine = given
        if dist.get_rank() == world - 1:
            mine = {name: tensor for name, tensor in given.items() if "layers.1." not in name}
        start = time.monotonic()
        with pytest.raises(ParallelError, match="ranks disagree") as caught:
            adapter().to_hf(mine, gather=True)
        assert time.monotonic() - start < 30
        assert ("layers.1." in str(caught.value)) == (dist.get_rank() != world - 1)
    name = next(name for name in state if "down_projs" in name)
    wrong = state[name].float() if dist.get_rank() == 0 else state[name]
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().convert_single_tensor_to_hf(name, wrong)


def disagree_on_arguments(world: int) -> None:
    """Excluded names and the size of the staging decide which collectives run, so ranks must agree on them too."""
    state, mine = model(world), str(dist.get_rank())
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().to_hf(state, rf".*layers\.{mine}\..*", gather=True)
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().to_hf(state, gather=True, staging_bytes=1000 + dist.get_rank())


def stay_away(world: int) -> None:
    """The last rank never calls: the others say so once the time limit is over."""
    state = model(world)
    collectives.AGREEMENT_SECONDS = 2.0
    if dist.get_rank() == world - 1:
        time.sleep(6)
        return
    start = time.monotonic()
    with pytest.raises(ParallelError, match="could not agree") as caught:
        adapter().to_hf(state, gather=True)
    assert time.monotonic() - start < 6
    assert "logs of the other ranks" in str(caught.value)


def die(world: int) -> None:
    """The last rank is gone in the middle of a gather."""
    state = model(world)
    if dist.get_rank() == world - 1:
        original = collectives.gather
        calls = []

        def gather(*arguments: object) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) == 2:
                os._exit(0)
            return original(*arguments)  # type: ignore[arg-type]

        from gemma4_moe.adapter import to_hf

        to_hf.gather = gather
    with pytest.raises(ParallelError, match="could not gather") as caught:
        adapter().to_hf(state, gather=True)
    assert "was killed" in str(caught.value)


def refuse_partial(world: int) -> None:
    state = model(world)
    name = next(name for name in state if "down_projs" in name)
    mesh = init_device_mesh("cpu", (world,))
    whole = nemo_from_hf(random_hf_state_dict())[name]
    state[name] = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    for gather in (False, True):
        with pytest.raises(ParallelError, match="Partial") as caught:
            adapter().to_hf(state, gather=gather)
        assert name in str(caught.value)


def refuse_unknown_mesh(world: int) -> None:
    hf = random_hf_state_dict()
    for names in (None, ("tp",)):
        with pytest.raises(ParallelError, match="does not say how experts are sharded"):
            adapter().from_hf(hf, init_device_mesh("cpu", (world,), mesh_dim_names=names))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    nothing_known = Gemma4MoEStateDictAdapter(None, None, None)
    with pytest.raises(ParallelError, match="whole or a shard"):
        nothing_known.from_hf(hf, mesh)
    with pytest.raises(ValueError, match="wrong shape"):
        adapter().from_hf({name: t[:2] if t.shape[:1] == (6,) else t for name, t in hf.items()}, mesh)


def cut_pipeline_away(world: int) -> None:
    """An outer pp dimension says nothing of experts: the stage's own ranks share them."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "ep"))
    hf = random_hf_state_dict()
    found = adapter().from_hf(hf, mesh)
    expected = shard(nemo_from_hf(hf), mesh["ep"], (Shard(0),))
    for name, tensor in expected.items():
        if isinstance(tensor, type(found[name])) and hasattr(tensor, "to_local"):
            assert torch.equal(found[name].to_local(), tensor.to_local()), name
            assert found[name].device_mesh.mesh_dim_names == ("ep",)
