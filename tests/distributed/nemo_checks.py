"""Checks on each rank of NeMo AutoModel's own Checkpointer with our adapter; expected weights come by formula."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel
from support import peer
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import read_directory

if TYPE_CHECKING:
    from pathlib import Path

State = dict[str, torch.Tensor]
TIED = "lm_head.weight"


def check_all(sizes: dict[str, int], bases: dict[str, Path], target: Path, cases: list[tuple[str, str]]) -> None:
    """Check each pair of a base checkpoint's name and the model's dtype, with our adapter installed."""
    gc.freeze()  # the Checkpointer collects garbage after each load, and would walk through all of NeMo's modules
    with nemo_automodel.installed():
        for name, dtype in cases:
            check(sizes, bases[name], target / f"{name}-{dtype}", getattr(torch, dtype))


def check(sizes: dict[str, int], base: Path, target: Path, dtype: torch.dtype) -> None:
    """Load an hf checkpoint, save it consolidated, and load both that and the shards again."""
    model, checkpointer = parallelized(sizes, base, target, dtype)
    expected = native(read_directory(base), dtype)
    exported = exported_like(base, expected)
    consolidated = target / "model" / "consolidated"

    check_load(model, checkpointer, base, expected)
    checkpointer.save_model(model, str(target))
    dist.barrier()
    assert_same_tensors(read_directory(consolidated), exported)

    forget(model)
    checkpointer.load_model(model, str(target / "model"))
    assert_same_tensors(whole_state(model), expected)
    check_load(model, checkpointer, consolidated, native(exported, dtype))
    checkpointer.close()


def check_load_alone(ours: bool, base: Path, target: Path) -> None:
    """Load under FSDP, with our adapter or with theirs."""
    with nemo_automodel.installed() if ours else nullcontext():
        model, checkpointer = parallelized({}, base, target, torch.float32)
        check_load(model, checkpointer, base, native(read_directory(base), torch.float32))


def check_save_alone(ours: bool, base: Path, target: Path) -> None:
    """Save under FSDP what torch has put in place, with our adapter or with theirs."""
    with nemo_automodel.installed() if ours else nullcontext():
        model, checkpointer = parallelized({}, base, target, torch.float32)
        expected = native(read_directory(base), torch.float32)
        fill(model, expected)
        checkpointer.save_model(model, str(target))
        dist.barrier()
    assert_same_tensors(read_directory(target / "model" / "consolidated"), exported_like(base, expected))


def check_refusal(sizes: dict[str, int], base: Path, target: Path) -> None:
    """Values of fp32 are not read into bf16 storage, on no rank, and the weights stay as they are."""
    with nemo_automodel.installed():
        model, checkpointer = parallelized(sizes, base, target, torch.bfloat16)
        fill(model, dict.fromkeys(model.state_dict(), torch.tensor(2.0)))
        with pytest.raises(UsageError, match="round twice") as refused:
            checkpointer.load_base_model(model, torch.device("cpu"), str(base), str(base))
    assert refused.value.facts["found"] == "float32"
    assert all(bool((local_of(tensor) == 2).all()) for tensor in model.state_dict().values())


def check_load(model: torch.nn.Module, checkpointer: Any, directory: Path, expected: State) -> None:
    forget(model)
    checkpointer.load_base_model(model, torch.device("cpu"), str(directory.parent), str(directory))
    assert_same_tensors(whole_state(model), expected)


def native(published: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in nemo_from_hf(published, dtype).items()}


def exported_like(base: Path, expected: State) -> State:
    """Return NeMo's export of native weights: the hf layout in the dtype of the base checkpoint."""
    dtype = next(iter(read_directory(base).values())).dtype
    return {name: tensor.to(dtype) for name, tensor in hf_from_nemo(expected).items()}


def parallelized(sizes: dict[str, int], base: Path, target: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """NeMo's model of a checkpoint's config, sharded by NeMo's parallelizer over NeMo's meshes, and a Checkpointer."""
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.distributed.mesh import MeshContext, ParallelismSizes
    from nemo_automodel.components.moe.parallelizer import parallelize_model
    from transformers import AutoConfig

    model = peer.model(AutoConfig.from_pretrained(base)).to(dtype)
    model._pre_shard_hf_state_dict_keys = model.state_dict_adapter.get_hf_state_dict_keys(model.state_dict())
    config = CheckpointingConfig(checkpoint_dir=target, model_repo_id=str(base), save_consolidated=True)
    world = dist.get_world_size()
    if world == 1:
        return model, config.build(0, 0, 0)
    mesh = MeshContext.build(FSDP2Config(), ParallelismSizes(**sizes), world_size=world)
    parallelize_model(model, mesh.device_mesh, mesh.moe_mesh, **mesh.parallelize_axis_kwargs())
    return model, config.build(dist.get_rank(), 0, 0, mesh.moe_mesh)


def fill(model: torch.nn.Module, values: State) -> None:
    """Give every weight its value, sharded by torch as the weight is."""
    for name, tensor in model.state_dict().items():
        value = values["model.language_model.embed_tokens.weight" if name == TIED else name].expand(tensor.shape)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value.contiguous(), tensor.device_mesh, tensor.placements, src_data_rank=None)
        local_of(tensor).copy_(local_of(value))


def forget(model: torch.nn.Module) -> None:
    """Make every weight NaN, so that one which is not loaded shows."""
    for tensor in model.state_dict().values():
        local_of(tensor).fill_(float("nan"))


def whole_state(model: torch.nn.Module) -> State:
    """Every weight and persistent buffer, gathered by torch; the head must be the embedding, and is left out."""
    state = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    assert torch.equal(state.pop(TIED), state["model.language_model.embed_tokens.weight"])
    return state


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
