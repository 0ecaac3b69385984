"""The parts of a checkpoint's stored tensors that a rank needs, and how they fill its tensors of the model.

A rank needs runs of rows of a stored tensor: its experts, its indices of axis 0, or a tensor's only row. Any block of
these rows can be installed by itself, so that the same needs serve a load by this rank alone and one that ranks share.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter.parts import write_rows
from gemma4_moe.converter.blocks import row_bytes, rows_at_once
from gemma4_moe.distributed.placements import local_of, placed, take
from gemma4_moe.distributed.sharding import overlaps
from gemma4_moe.kernels import scale_cast
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.table import transposes
from gemma4_moe.model_io.pipeline import Exchange, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.plan import PlannedTensor
    from gemma4_moe.layout.targets import Read

#: The dtypes of a model that any floating-point dtype of a file may be loaded into.
CASTABLE = tuple(getattr(torch, dtype.name) for dtype in EXPERT_DTYPES)


class Wanted(NamedTuple):
    """Rows of a stored tensor, and the tensor that they fill.

    Attributes:
        row_bytes: The size of a row.
        runs: The rows (start, end) that this rank needs, counted in the stored tensor, in order.
        device: The device of the tensor that they fill.
        install: Takes rows (first, last), all of one run, as a flat tensor of the stored dtype, and the two numbers.
    """

    stored: StoredTensor
    row_bytes: int
    runs: tuple[range, ...]
    device: torch.device
    install: Callable[[torch.Tensor, int, int], None]

    @property
    def nbytes(self) -> int:
        """The size of all rows that this rank needs."""
        return self.row_bytes * sum(map(len, self.runs))

    def job(self, first: int, last: int, exchange: Exchange | None = None) -> Job:
        """Return the job that reads or receives rows (first, last), all of one run."""
        start, size = first * self.row_bytes, (last - first) * self.row_bytes

        def install(values: torch.Tensor) -> None:
            self.install(values, first, last)

        return Job(self.stored, start, size, self.device, install, exchange)


def blocks_of(first: int, last: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield rows (first, last), of `nbytes` bytes each, cut into blocks."""
    step = rows_at_once(nbytes)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def wanted_of(
    state: Mapping[str, torch.Tensor], planned: Mapping[str, PlannedTensor]
) -> tuple[list[Wanted], list[Wanted]]:
    """Return this rank's needs for its tensors: first the scales, which must be there before the experts are."""
    scales: list[Wanted] = []
    tensors: list[Wanted] = []
    for name, tensor in state.items():
        target, local = planned[name], local_of(tensor)
        assert target.source is not None, "every nemo tensor comes from an hf tensor"
        if local.numel() == 0:
            continue
        whole = tuple((range(size),) for size in target.shape)
        runs = placed(tensor, name).runs(target.shape) if isinstance(tensor, DTensor) else whole
        if not transposes(target.operation):
            tensors.append(_same(local, runs, target.source.parts[0].stored))
            continue
        factors = None
        if target.scale is not None:
            dtype = getattr(torch, target.scale.dtype.name)
            factors = torch.empty(target.scale.shape, dtype=dtype, device=local.device)
            scales.append(_same(factors, whole[:1], target.scale))
        tensors += _experts(local, runs, target.source.parts, factors)
    return scales, tensors


def _experts(
    local: torch.Tensor,
    runs: Sequence[Sequence[range]],
    parts: Sequence[Read[StoredTensor]],
    factors: torch.Tensor | None,
) -> Iterator[Wanted]:
    """Yield the needs of the experts [e, c, r] at `runs` of a native tensor [E, C, R].

    Each stored tensor goes through the kernel straight to the experts and rows that it holds.
    """

    def install(part: Read[StoredTensor], values: torch.Tensor, first: int, last: int) -> None:
        block = values.view(last - first, len(range(*part.rows)), -1)
        experts = part.experts[0] + first, part.experts[0] + last
        write_rows(local, runs, block, 3, experts, part.rows, factors, threads=1)

    for part in parts:
        begin, end = part.experts
        experts = tuple(range(run.start - begin, run.stop - begin) for _, run in overlaps(runs[0], begin, end))
        if experts and any(overlaps(runs[2], *part.rows)):
            size = row_bytes(part.end, (end - begin,))
            yield Wanted(part.stored, size, experts, local.device, partial(install, part))


def _same(local: torch.Tensor, runs: Sequence[Sequence[range]], stored: StoredTensor) -> Wanted:
    """Return the needs of the part at `runs` of a tensor that is the same in both layouts."""
    rows, target = (runs[0], local) if stored.shape else ((range(1),), local.reshape(1))

    def install(values: torch.Tensor, first: int, last: int) -> None:
        ((held, _),) = overlaps(rows, first, last)
        block = values.view(last - first, *stored.shape[1:])
        part = take(block, ((range(len(block)),), *runs[1:]))
        if stored.dtype.float_format is None or target.dtype not in CASTABLE:
            target[held].copy_(part)
        else:
            scale_cast(part, out=target[held], threads=1)

    return Wanted(stored, row_bytes(stored.nbytes, stored.shape), tuple(rows), local.device, install)
