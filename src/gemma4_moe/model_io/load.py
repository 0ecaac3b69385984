"""Fill a model's native tensors straight from an hf directory: each rank reads its own experts' bytes and no others.

Blocks of experts go from the file through the kernel into the model's storage, several at a time (`pipeline`). A rank
needs these blocks beside the model. The fold is rounded once, whatever the dtypes of the file and of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter.parts import write_rows
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter.blocks import load_block_bytes, row_bytes, rows_at_once
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.distributed.placements import local_of, placed, take
from gemma4_moe.distributed.sharding import overlaps
from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError
from gemma4_moe.hub.source import locate
from gemma4_moe.kernels import scale_cast
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.table import Layout, transposes
from gemma4_moe.layout.wrappers import plain_state
from gemma4_moe.model_io.pipeline import Job, Pipeline
from gemma4_moe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.converter.plan import PlannedTensor
    from gemma4_moe.layout.targets import Read, Source

#: The dtypes of a model that any floating-point dtype of a file may be loaded into.
_CASTABLE = tuple(getattr(torch, dtype.name) for dtype in EXPERT_DTYPES)


@dataclass(frozen=True, slots=True, repr=False)
class Loaded:
    """The result of `load_hf` on this rank.

    Attributes:
        filled: Names of the tensors that were filled.
        read_bytes: Bytes that were read from the checkpoint's weights.
        unused: Names, in the nemo layout, of tensors of the checkpoint that the model does not have.
    """

    filled: tuple[str, ...]
    read_bytes: int
    unused: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Loaded {len(self.filled):,} tensors, {format_size(self.read_bytes)}; {len(self.unused):,} unused>"


def load_hf(module_or_state: torch.nn.Module | Mapping[str, torch.Tensor], path: str | Path) -> Loaded:
    """Fill a native model from a checkpoint in the hf layout. Nothing communicates: ranks may load at any time.

    Args:
        module_or_state: A module whose `state_dict()` has nemo names, buffers and tied aliases included; or such a
            mapping. Names lose the components of torch's wrappers. DTensors of any placement, or plain tensors, on
            any device; a pipeline stage may have a part of the layers.
        path: A directory, or a Hub id.

    Raises:
        InputError: It is not an hf checkpoint of Gemma 4 MoE, lacks a tensor of the model, or has another shape of it.
        UsageError: A tensor of the model is on the meta device.
    """
    state = state_of(module_or_state)
    with open_checkpoint(locate(path)) as checkpoint:
        planned = make_plan(checkpoint, to=Layout.NEMO).tensors
        _check(state, planned, str(checkpoint.path))
        filled = {name: tensor for name, tensor in state.items() if name in planned}
        pipeline = Pipeline(load_block_bytes(planned.values()), {tensor.device for tensor in filled.values()})
        read_bytes = pipeline.run(job for name, tensor in filled.items() for job in _jobs(tensor, planned[name]))
        held = [planned[name].scale for name, tensor in filled.items() if local_of(tensor).numel()]
        read_bytes += sum(scale.nbytes for scale in held if scale is not None)
        checkpoint.check_unchanged()
    return Loaded(tuple(filled), read_bytes, tuple(name for name in planned if name not in state))


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


def _check(state: Mapping[str, torch.Tensor], planned: Mapping[str, PlannedTensor], path: str) -> None:
    """Check all that can be checked before anything is filled."""
    tied = {storage_key(tensor) for name, tensor in state.items() if name in planned}
    for name, tensor in state.items():
        if name in planned:
            _check_form(tensor, planned[name], path)
        elif storage_key(tensor) not in tied:
            raise UnknownTensorError(
                "a tensor of the model that the checkpoint does not have",
                tensor=name,
                file=path,
                hint="check that model and checkpoint have the same kind (multimodal or text-only) and prefix",
            )


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
    castable = dtype in _CASTABLE and file.float_format is not None
    if not castable and (transposes(planned.operation) or str(dtype).removeprefix("torch.") != file.name):
        raise TensorShapeError(
            "a tensor of the model has a dtype that the checkpoint's can't be loaded into",
            tensor=planned.name,
            expected=f"{file.name}, or a floating-point dtype of 16 or 32 bits" if file.float_format else file.name,
            found=str(dtype),
            hint="hold the weights in bfloat16, float16 or float32",
        )


def _jobs(tensor: torch.Tensor, planned: PlannedTensor) -> Iterator[Job]:
    """Yield the reads that fill this rank's part of one tensor."""
    assert planned.source is not None, "every nemo tensor comes from an hf tensor"
    whole = tuple((range(size),) for size in planned.shape)
    runs = placed(tensor, planned.name).runs(planned.shape) if isinstance(tensor, DTensor) else whole
    local = local_of(tensor)
    if local.numel() == 0:
        return
    if not transposes(planned.operation):
        yield from _same(local, runs, planned.source.parts[0].stored)
        return
    factors: list[torch.Tensor] = []
    if planned.scale is not None:
        factors.append(_read_scale(planned.scale, local.device))
    yield from _experts(local, runs, planned.source, *factors)


def _blocks(runs: Sequence[range], size: int) -> Iterator[tuple[slice, int, int]]:
    """Yield blocks of rows, of `size` bytes each: the local rows, and (start, end) in the whole tensor."""
    step = rows_at_once(size)
    for held, rows in overlaps(runs, 0, max(run.stop for run in runs)):
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            start = held.start + first - rows.start
            yield slice(start, start + last - first), first, last


def _experts(
    local: torch.Tensor,
    runs: Sequence[Sequence[range]],
    source: Source[StoredTensor],
    factors: torch.Tensor | None = None,
) -> Iterator[Job]:
    """Yield the reads that fill the experts [e, c, r] at `runs` of a native tensor [E, C, R].

    Each stored tensor goes through the kernel straight to the experts and rows that it holds.
    """

    def install(read: Read[StoredTensor], values: torch.Tensor) -> None:
        block = values.view(-1, len(range(*read.rows)), source.shape[2])
        write_rows(local, runs, block, 3, read.experts, read.rows, factors, threads=1)

    for _, first, last in _blocks(runs[0], row_bytes(source.nbytes, source.shape)):
        for read in source.reads(first, last):
            if any(overlaps(runs[2], *read.rows)):
                size = read.end - read.start
                yield Job(read.stored, read.start, size, local.device, partial(install, read))


def _same(local: torch.Tensor, runs: Sequence[Sequence[range]], stored: StoredTensor) -> Iterator[Job]:
    """Yield the reads that fill the part at `runs` of a tensor that is the same in both layouts."""
    rows, target = (runs[0], local) if stored.shape else ((range(1),), local.reshape(1))
    size = row_bytes(stored.nbytes, stored.shape)

    def install(held: slice, values: torch.Tensor) -> None:
        block = values.view(held.stop - held.start, *stored.shape[1:])
        part = take(block, ((range(len(block)),), *runs[1:]))
        if stored.dtype.float_format is None or target.dtype not in _CASTABLE:
            target[held].copy_(part)
        else:
            scale_cast(part, out=target[held], threads=1)

    for held, first, last in _blocks(rows, size):
        yield Job(stored, first * size, (last - first) * size, local.device, partial(install, held))


def _read_scale(stored: StoredTensor, device: torch.device) -> torch.Tensor:
    """Return a scale [E] on a device, complete for every stream."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    stored.read_into(raw.numpy().data, 0)
    return raw.view(getattr(torch, stored.dtype.name)).to(device)
