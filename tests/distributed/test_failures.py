"""Nothing hangs: ranks that disagree fail together, and a rank that is lost is named with the logs to read."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from distributed.placement_checks import same, shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.distributed import collectives
from gemma4_moe.distributed.gathering import Gatherer
from gemma4_moe.errors import ParallelError
from support import ranks
from support.formulas import nemo_from_hf
from support.models import NATIVE_DOWN, random_hf_state_dict


def model(world):
    return shard(nemo_from_hf(random_hf_state_dict()), init_device_mesh("cpu", (world,)), (Shard(0),))


def adapter():
    return Gemma4MoEStateDictAdapter(None, MoEConfig(6), None, dtype=torch.bfloat16)


def fail_together_if_they_disagree(world):
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
    wrong = state[NATIVE_DOWN].float() if dist.get_rank() == 0 else state[NATIVE_DOWN]
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().convert_single_tensor_to_hf(NATIVE_DOWN, wrong)


def fail_together_if_they_disagree_on_arguments(world):
    """Excluded names and the size of the staging decide which collectives run, so ranks must agree on them too."""
    state, mine = model(world), str(dist.get_rank())
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().to_hf(state, rf".*layers\.{mine}\..*", gather=True)
    with pytest.raises(ParallelError, match="ranks disagree"):
        adapter().to_hf(state, gather=True, staging_bytes=1000 + dist.get_rank())


def do_not_wait_for_one_that_stays_away(world):
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


def end_when_one_is_killed(world):
    """The last rank is gone in the middle of a gather."""
    state = model(world)
    if dist.get_rank() == world - 1:
        original = Gatherer.add
        calls = []

        def add(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                os._exit(0)
            return original(*arguments)

        Gatherer.add = add
    with pytest.raises(ParallelError, match="could not gather") as caught:
        adapter().to_hf(state, gather=True)
    assert "was killed" in str(caught.value)


def refuse_partial(world):
    state = model(world)
    mesh = init_device_mesh("cpu", (world,))
    whole = nemo_from_hf(random_hf_state_dict())[NATIVE_DOWN]
    state[NATIVE_DOWN] = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    for gather in (False, True):
        with pytest.raises(ParallelError, match="Partial") as caught:
            adapter().to_hf(state, gather=gather)
        assert NATIVE_DOWN in str(caught.value)


def refuse_an_unknown_mesh(world):
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


def cut_an_outer_pipeline_dimension_away(world):
    """An outer pp dimension says nothing of experts: the stage's own ranks share them."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "ep"))
    hf = random_hf_state_dict()
    found = adapter().from_hf(hf, mesh)
    expected = shard(nemo_from_hf(hf), mesh["ep"], (Shard(0),))
    same(found, expected)
    assert {t.device_mesh.mesh_dim_names for t in found.values() if isinstance(t, DTensor)} == {("ep",)}


@pytest.mark.parametrize(
    ("check", "world", "options"),
    [
        (fail_together_if_they_disagree, 4, {}),
        (fail_together_if_they_disagree_on_arguments, 2, {}),
        (do_not_wait_for_one_that_stays_away, 2, {"meet_at_end": False}),
        (end_when_one_is_killed, 3, {"meet_at_end": False, "seconds": 90}),
        (refuse_partial, 2, {}),
        (refuse_an_unknown_mesh, 2, {}),
        (cut_an_outer_pipeline_dimension_away, 4, {}),
    ],
)
def test_ranks(check, world, options):
    ranks.run(world, check, world, **options)
