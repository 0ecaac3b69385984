"""Fill a model's native tensors straight from an hf directory: each rank reads its own experts' bytes and no others.

Blocks of experts go from the file through the kernel into the model's storage, several at a time (`pipeline`). A rank
needs these blocks beside the model. Ranks that need the same blocks can share them (`sharing`). The fold is rounded
once, whatever the dtypes of the file and of the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter.blocks import load_block_bytes
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.distributed.ranks import Ranks, current, members_of
from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError
from gemma4_moe.hub.source import locate
from gemma4_moe.layout.table import Layout, transposes
from gemma4_moe.layout.wrappers import plain_state
from gemma4_moe.model_io.pipeline import Pipeline
from gemma4_moe.model_io.sharing import Sharing, require_backend
from gemma4_moe.model_io.wanted import CASTABLE, wanted_of
from gemma4_moe.sizes import format_size
from gemma4_moe.target.pieces import Count

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.converter.plan import PlannedTensor
    from gemma4_moe.sizes import Progress


@dataclass(frozen=True, slots=True, repr=False)
class Loaded:
    """The result of `load_hf` on this rank.

    Attributes:
        filled: Names of the tensors that were filled.
        read_bytes: Bytes that this rank read from the checkpoint's weights.
        missing_keys: Names of tensors of the model that the checkpoint does not have; they are as they were.
        unexpected_keys: Names, in the nemo layout, of tensors of the checkpoint that the model does not have.
    """

    filled: tuple[str, ...]
    read_bytes: int
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]

    def __repr__(self) -> str:
        keys = f"{len(self.missing_keys):,} missing, {len(self.unexpected_keys):,} unexpected"
        return f"<Loaded {len(self.filled):,} tensors, {format_size(self.read_bytes)}; {keys}>"


def load_hf(
    module_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    revision: str | None = None,
    strict: bool = True,
    share_reads: bool | torch.distributed.ProcessGroup = False,
    progress: Progress | None = None,
) -> Loaded:
    """Fill a native model from a checkpoint in the hf layout. Without `share_reads`, nothing communicates.

    Args:
        module_or_state: A module whose `state_dict()` has nemo names, buffers and tied aliases included; or such a
            mapping. Names lose the components of torch's wrappers. DTensors of any placement, or plain tensors, on
            any device; a pipeline stage may have a part of the layers.
        path: A directory, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        strict: Whether every tensor of the model must be in the checkpoint. If not, those that are not keep their
            values, and are named in `missing_keys`. In both cases, unlike in torch, the checkpoint may have more.
        share_reads: Let each byte be read by one rank, which sends it to those that need it as well: among all ranks
            of torch's default process group (True), or among those of a group, such as a node's. All of these must
            call, each with its own tensors. For devices that the group's backend can send from.
        progress: Called with the bytes that this rank has read or received, and with their total.

    Raises:
        InputError: It is not an hf checkpoint of Gemma 4 MoE, lacks a tensor of the model, or has another shape of it.
        UsageError: A tensor of the model is on the meta device; a directory has no revision; or the process group can't
            send from the model's device.
        ParallelError: Another rank that shares reads failed, was killed or did not call; ranks have different
            checkpoints, or tensors on different kinds of devices.
    """
    ranks = _sharing(share_reads)
    with ExitStack() as stack:
        with ranks.together("open the checkpoint"):
            state = state_of(module_or_state)
            checkpoint = stack.enter_context(open_checkpoint(locate(path, revision)))
            planned = make_plan(checkpoint, to=Layout.NEMO).tensors
            missing = _check(state, planned, str(checkpoint.path), strict=strict)
            filled = {name: tensor for name, tensor in state.items() if name in planned}
            phases = wanted_of(filled, planned)
            count = Count([sum(wanted.nbytes for phase in phases for wanted in phase)], progress)
            devices = {tensor.device for tensor in filled.values()}
            require_backend(ranks, devices)
            pipeline = Pipeline(load_block_bytes(planned.values()), devices, count)
        sharing = Sharing(ranks, checkpoint, filled.values())
        read_bytes = 0
        for phase in phases:
            for jobs in sharing.segments(phase):
                with ranks.together("read its share of the checkpoint"):
                    read_bytes += pipeline.run(jobs)
        with ranks.together("find the checkpoint unchanged"):
            checkpoint.check_unchanged()
    return Loaded(tuple(filled), read_bytes, missing, tuple(name for name in planned if name not in state))


def _sharing(share_reads: Any) -> Ranks:
    """Return the ranks that share reads: those of the default process group, of another one, or this one alone."""
    if isinstance(share_reads, bool):
        return current() if share_reads else Ranks()
    return members_of(share_reads)


def state_of(module_or_state: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's state dict, or of a mapping, as `plain_state` names them.

    Raises:
        DuplicateTensorError: Two names become one without their wrappers.
        UsageError: An entry is no tensor, or holds no values.
    """
    state = module_or_state.state_dict() if isinstance(module_or_state, torch.nn.Module) else module_or_state
    tensors = plain_state(state)
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise UsageError(
                "an entry of the state that holds no values",
                tensor=name,
                expected="a torch tensor with storage",
                found="a tensor on the meta device" if isinstance(value, torch.Tensor) else type(value).__name__,
                hint="give a module or its state_dict(); materialise meta tensors first: to_empty()",
            )
    return tensors


def storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two names of one tied tensor have in common."""
    local = local_of(tensor)
    return local.device, local.untyped_storage().data_ptr(), local.storage_offset(), local.shape, local.stride()


def _check(
    state: Mapping[str, torch.Tensor], planned: Mapping[str, PlannedTensor], path: str, *, strict: bool
) -> tuple[str, ...]:
    """Check all that can be checked before anything is filled; return the names that the checkpoint lacks."""
    tied = {storage_key(tensor) for name, tensor in state.items() if name in planned}
    missing = []
    for name, tensor in state.items():
        if name in planned:
            _check_form(tensor, planned[name], path)
        elif storage_key(tensor) not in tied:
            missing.append(name)
    if missing and (strict or len(missing) == len(state)):
        raise UnknownTensorError(
            "a tensor of the model that the checkpoint does not have" if strict else "no tensor of the model is there",
            tensor=missing[0],
            file=path,
            hint="check that model and checkpoint have the same kind (multimodal or text-only) and prefix"
            + ("; or give strict=False to leave such tensors as they are" if strict else ""),
        )
    return tuple(missing)


def _check_form(tensor: torch.Tensor, planned: PlannedTensor, path: str) -> None:
    """Check a tensor's shape, and that it can take in the file's dtype: floats in floats, all else in its own dtype."""
    if tuple(tensor.shape) != planned.shape:
        raise TensorShapeError(
            "a tensor of the model has another shape than the checkpoint's",
            tensor=planned.name,
            file=path,
            expected=list(planned.shape),
            found=list(tensor.shape),
            hint="check that model and checkpoint have the same config",
        )
    dtype, file = tensor.dtype, planned.dtype  # that of the file: the plan casts nothing
    castable = dtype in CASTABLE and file.float_format is not None
    if not castable and (transposes(planned.operation) or str(dtype).removeprefix("torch.") != file.name):
        raise TensorShapeError(
            "a tensor of the model has a dtype that the checkpoint's can't be loaded into",
            tensor=planned.name,
            expected=f"{file.name}, or a floating-point dtype of 16 or 32 bits" if file.float_format else file.name,
            found=str(dtype),
            hint="hold the weights in bfloat16, float16 or float32",
        )
