"""Expert tensors that are stored in several tensors a role: each is written straight to its place in the native one.

Nothing is put together first: the kernel writes experts (start, end) and rows (start, end) of a role to
`native[experts, :, rows]`, and a rank takes only what its shard holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.placements import local_of, placed, take
from gemma4_moe.distributed.sharding import overlaps
from gemma4_moe.errors import ParallelError
from gemma4_moe.kernels import transpose_scale_cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gemma4_moe.adapter.entries import Entry


def write_part(native: torch.Tensor, entry: Entry, scale: Entry | None, kernel: str) -> None:
    """Write one part of a role into this rank's shard of the native tensor [E, C, R].

    The part is [r, C] of one expert, or [E, r, C]; the scale [E] is that of a part of down_proj, else None. A DTensor
    is refused with a ParallelError.
    """
    for given in (entry, scale):
        if given is not None and isinstance(given.value, DTensor):
            raise ParallelError(
                "a DTensor in a checkpoint that has several tensors for a role",
                tensor=given.name,
                expected="whole tensors, of which each rank takes its own shard",
                found=str(given.value.placements),
                hint="give plain tensors, and `device_mesh` or `out`",
            )
    assert entry.parsed is not None, "an expert tensor"
    shape, local, whole = tuple(native.shape), local_of(native), tuple((range(size),) for size in native.shape)
    runs = placed(native, entry.parsed.nemo).runs(shape) if isinstance(native, DTensor) else whole
    experts, rows = entry.parsed.part.experts(shape[0]), entry.parsed.part.rows(shape[2])
    factors = None if scale is None else scale.read().detach().to(local.device)
    write_rows(local, runs, entry.value, len(entry.shape), experts, rows, factors, kernel)


def write_rows(
    local: torch.Tensor,
    runs: Sequence[Sequence[range]],
    values: Any,
    ndim: int,
    experts: tuple[int, int],
    rows: tuple[int, int],
    scale: torch.Tensor | None,
    kernel: str = "auto",
    threads: int | None = None,
) -> None:
    """Write experts (start, end) and rows (start, end) of a role into `local`, the part at `runs` of the native tensor.

    `values` are [e, r, C], or [r, C] of one expert, and may be lazy; `scale` is that of all experts, [E], or None.
    """
    for held, some in overlaps(runs[0], *experts):
        for columns, lines in overlaps(runs[2], *rows):
            wanted = [[_from(some, experts[0])], [_from(lines, rows[0])], runs[1]]
            part = take(values, wanted[3 - ndim :]).to(local.device)
            factor = None if scale is None else scale[some.start : some.stop]
            out = local[held, :, columns]
            transpose_scale_cast(part.view(-1, *part.shape[-2:]), scale=factor, out=out, kernel=kernel, threads=threads)


def _from(indices: range, start: int) -> range:
    """Return indices as they count from `start`."""
    return range(indices.start - start, indices.stop - start)
