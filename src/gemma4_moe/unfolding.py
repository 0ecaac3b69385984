"""The way back of the fold: which experts of a native tensor can be written as the weights and scale they came from.

An expert is written as (w̃, s) exactly if fold(w̃, s) has its native bits, where s is what the source's manifest names
and w̃ is native / s, rounded to the dtype that the manifest names; otherwise as its native bits with the scale one.
Nothing is believed of a manifest, and no division is trusted: the candidate is folded again, and bits are compared.
A scale that is zero or not finite divides nothing out.

An expert is judged while it is converted. Its scale is asked for later, since it lies behind the experts in the file;
where another rank or an earlier run has converted the expert, it is read and judged once more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.layouts import DOWN, Layout, lookup

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from gemma4_moe.checkpoints.directories import StoredTensor
    from gemma4_moe.checkpoints.manifest import Folded
    from gemma4_moe.dtypes import DType
    from gemma4_moe.planning import PlannedTensor

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are computed at once; a thread has up to 17 bytes for each.
_PIECE = 2**17


@dataclass(frozen=True, slots=True)
class _Experts:
    """What is known of the experts of one tensor.

    Attributes:
        candidate: The scale that each may be written with, [E], fp32; one where none may.
        dtype: The dtype that w̃ is rounded to.
        scale: The scale that each is written with, [E], fp32.
        known: Whether that has been found, [E].
    """

    candidate: Array
    dtype: DType
    scale: Array
    known: Array


class Unfolding:
    """The experts of one conversion on their way back. Used by one thread; use it as a context manager."""

    def __init__(self, tensors: Iterable[PlannedTensor], *, workers: int, buffered: bool) -> None:
        """Begin with nothing converted.

        Args:
            tensors: What is written. Those that a manifest says something of are unfolded.
            workers: How many threads work on an expert.
            buffered: Whether to read through the page cache what has to be read again.
        """
        self._tensors = {tensor.name: tensor for tensor in tensors if tensor.folded is not None}
        self._experts = {
            tensor.name: _begin(tensor.folded, tensor.dtype)
            for tensor in self._tensors.values()
            if tensor.folded is not None
        }
        self._workers = workers
        self._buffered = buffered
        self._pool = ThreadPoolExecutor(workers, "gemma4-moe-unfolding")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def convert(self, name: str, first: int, native: Array, out: Array) -> None:
        """Write experts as what they came from, or as they are, and remember which.

        Args:
            name: The target's tensor, a `down_proj`.
            first: The number of the first expert.
            native: The experts, [n, I, H].
            out: Where to write them, [n, H, I].
        """
        experts = self._experts[name]
        for number, (expert, into) in enumerate(zip(native, out, strict=True), first):
            if not self._judge(experts, number, expert, out.dtype, into):
                kernels.transpose_scale_cast(expert, out=into, threads=self._workers)

    def scales(self, name: str, buffer: memoryview) -> Array | None:
        """Return the fp32 scale [E] of each expert, or None where all are one.

        Args:
            name: The target's tensor, a `per_expert_scale`.
            buffer: Where an expert can be read again.

        Raises:
            CheckpointFormatError, StorageError: What reading experts again raises.
        """
        parsed = lookup(name, Layout.HF)
        tensor = None if parsed is None else self._tensors.get(parsed.sibling(DOWN).hf)
        if tensor is None or tensor.source is None:
            return None
        experts = self._experts[tensor.name]
        missing = np.flatnonzero(~experts.known).tolist()
        if missing:
            with closing(tensor.source.file.reader(buffered=self._buffered)) as reader:
                for number in missing:
                    raw = reader.read(*_place(tensor.source, number), buffer)
                    native = np.frombuffer(raw, np.uint8).view(tensor.source.dtype.numpy())
                    self._judge(experts, number, native.reshape(tensor.source.shape[1:]), tensor.dtype.numpy(), None)
        return experts.scale

    def _judge(self, experts: _Experts, number: int, native: Array, target: np.dtype[Any], out: Array | None) -> bool:
        """Say whether w̃ of an expert [I, H] folds to its bits, and remember it. If so, `out` holds w̃, else anything."""
        scale = experts.candidate[number]
        unfold = partial(_unfold_rows, native, scale, experts.dtype, target, out)
        size, width = native.shape
        first, step = (max(1, elements // width) for elements in (_FIRST, _PIECE))
        rest = (slice(row, row + step) for row in range(first, size, step))
        same = bool(scale != 1) and unfold(slice(0, first)) and all(list(self._pool.map(unfold, rest)))
        if same:
            experts.scale[number] = scale
        experts.known[number] = True
        return same


def _begin(folded: Folded, target: DType) -> _Experts:
    """Return what is known at first: an expert without a candidate, whose scale `target` must hold, gets one."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.array(folded.scale).astype(np.float32)
        held = scale.astype(target.numpy()).astype(np.float32)
    usable = (held == folded.scale) & np.isfinite(scale) & (scale != 0)
    candidate = np.where(usable, scale, np.float32(1))
    return _Experts(candidate, folded.dtype, np.ones_like(candidate), candidate == 1)


def _place(source: StoredTensor, expert: int) -> tuple[int, int]:
    """Return the position of an expert in its file, and its size, both in bytes."""
    size = source.nbytes // source.shape[0]
    return source.entry.start + expert * size, size


def _unfold_rows(
    native: Array, scale: np.float32, dtype: DType, target: np.dtype[Any], out: Array | None, rows: slice
) -> bool:
    """Say whether w̃ of some rows of native [I, H] folds to their bits; if so, write it to the columns of out [H, I]."""
    piece = native[rows]
    quotient = kernels.scale_cast(piece, dtype=np.float32, threads=1)
    with np.errstate(all="ignore"):  # Inf and NaN are values like others
        np.divide(quotient, scale, out=quotient)
    rounded = kernels.scale_cast(quotient, dtype=dtype.numpy(), threads=1)
    weights = kernels.scale_cast(rounded, dtype=target, threads=1)
    again = kernels.scale_cast(weights[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), piece.view(np.uint8)):
        return False
    if out is not None:
        kernels.transpose_scale_cast(weights, out=out[:, rows], threads=1)
    return True
