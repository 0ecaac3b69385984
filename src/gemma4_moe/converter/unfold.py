"""The way back of the fold: which experts of a native tensor can be written as the weights and scale they came from.

An expert is written as (w̃, s) exactly if fold(w̃, s) has its native bits: with w̃ and s of the base, where one is
given; or else with the s that the source's manifest names and w̃ = native / s, rounded to the dtype that the manifest
names; otherwise as its native bits with the scale one. Nothing is believed of a base or a manifest, and no division is
trusted: what is to be written is folded again, and bits are compared. Nothing is divided by zero, infinity or NaN.

An expert is judged while it is converted. Its scale is asked for later, since it lies behind the experts in the file;
where another rank or an earlier run has converted the expert, it is read and judged once more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.converter.scales import read_scale
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.readers import Reader
    from gemma4_moe.converter.plan import PlannedTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.targets import Source

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are computed at once; a thread has up to 17 bytes for each.
_PIECE = 2**17


@dataclass(frozen=True, slots=True)
class _Experts:
    """What is known of the experts of one tensor.

    Attributes:
        tensor: The target's tensor [E, H, I].
        base: The base's scale of each, [E], fp32; None without a base.
        divisor: The scale that each may be divided by, [E], fp32; one where there is none.
        scale: The scale that each is written with, [E], fp32.
        known: Whether that has been found, [E].
    """

    tensor: PlannedTensor
    base: Array | None
    divisor: Array
    scale: Array
    known: Array


class Unfolding:
    """The experts of one conversion on their way back. Used by one thread; use it as a context manager."""

    def __init__(self, tensors: Iterable[PlannedTensor], base_bytes: int, *, workers: int, buffered: bool) -> None:
        """Begin with nothing converted.

        Args:
            tensors: What is written. Those that a manifest or a base says something of are unfolded.
            base_bytes: Size of the buffer for an expert of the base.
            workers: How many threads work on an expert.
            buffered: Whether to read the base, and what has to be read again, through the page cache.

        Raises:
            CheckpointFormatError, StorageError: What reading the base's scales raises.
        """
        self._experts = {tensor.name: _begin(tensor) for tensor in tensors if tensor.comes_back}
        self._buffer = allocate(base_bytes) if base_bytes else memoryview(b"")
        self._workers = workers
        self._buffered = buffered
        self._readers: dict[Path, Reader] = {}
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(workers, "gemma4-moe-unfolding"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def convert(self, name: str, first: int, native: Array, out: Array) -> None:
        """Write experts as what they came from, or as they are, and remember which.

        Args:
            name: The target's tensor, a `down_proj`.
            first: The number of the first expert.
            native: The experts, [n, I, H].
            out: Where to write them, [n, H, I].

        Raises:
            CheckpointFormatError, StorageError: What reading the base raises.
        """
        experts = self._experts[name]
        for number, (expert, into) in enumerate(zip(native, out, strict=True), first):
            if not self._judge(experts, number, expert, into):
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
        experts = None if parsed is None else self._experts.get(parsed.sibling(DOWN).hf)
        if experts is None:
            return None
        source = experts.tensor.source
        assert source is not None, "only a scale has no source"
        for number in np.flatnonzero(~experts.known).tolist():
            native = self._read(source, number, slice(0, source.shape[1]), buffer)
            self._judge(experts, number, native, None)
        return experts.scale

    def _judge(self, experts: _Experts, number: int, native: Array, out: Array | None) -> bool:
        """Say whether an expert [I, H] is unfolded, and remember it. If so, `out` holds its weights, else anything."""
        scale = None
        if experts.base is not None and self._is_base(experts, number, experts.base[number], native, out):
            scale = experts.base[number]
        elif self._is_product(experts, experts.divisor[number], native, out):
            scale = experts.divisor[number]
        if scale is not None:
            experts.scale[number] = scale
        experts.known[number] = True
        return scale is not None

    def _is_base(self, experts: _Experts, number: int, scale: np.float32, native: Array, out: Array | None) -> bool:
        """Say whether the base's expert folds to the native bits, read as far as that takes; if so, write it."""
        base = experts.tensor.base
        assert base is not None, "its scale is known"
        size, width = base.weights.shape[1:]
        first = min(size, max(1, _FIRST // width))
        for rows in (slice(0, first), slice(0, size)):
            weights = self._read(base.weights, number, rows, self._buffer)
            fold = partial(_fold_rows, weights, scale, native, out)
            if not all(list(self._pool.map(fold, _pieces(rows.stop, width)))):
                return False
        return True

    def _is_product(self, experts: _Experts, scale: np.float32, native: Array, out: Array | None) -> bool:
        """Say whether the native bits divided by the scale, and rounded, fold to themselves; if so, write them."""
        folded = experts.tensor.folded
        if folded is None or scale == 1:
            return False
        size, width = native.shape
        divide = partial(_divide_rows, native, scale, folded.dtype, experts.tensor.dtype.numpy(), out)
        first = slice(0, min(size, max(1, _FIRST // width)))
        return divide(first) and all(list(self._pool.map(divide, _pieces(size, width))))

    def _read(self, source: Source[StoredTensor], expert: int, rows: slice, buffer: memoryview) -> Array:
        """Return rows of one expert of a tensor [E, R, C] of a file, in `buffer`."""
        (read,) = source.reads(expert, expert + 1)  # no form cuts the rows of a down_proj
        stored, file = read.stored, read.stored.file
        if file.path not in self._readers:
            self._readers[file.path] = self._stack.enter_context(closing(file.reader(buffered=self._buffered)))
        width = source.shape[2]
        row = width * source.dtype.itemsize
        start = stored.entry.start + read.start + rows.start * row
        raw = self._readers[file.path].read(start, (rows.stop - rows.start) * row, buffer)
        return np.frombuffer(raw, np.uint8).view(source.dtype.numpy()).reshape(-1, width)


def _begin(tensor: PlannedTensor) -> _Experts:
    """Return what is known before anything is read but the base's scales: experts that can only be as they are."""
    divisor = np.ones(tensor.shape[0], np.float32)
    if tensor.folded is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.array(tensor.folded.scale).astype(np.float32)
            held = scale.astype(tensor.dtype.numpy()).astype(np.float32)
        divisor = np.where((held == tensor.folded.scale) & np.isfinite(scale) & (scale != 0), scale, np.float32(1))
    base = None if tensor.base is None else read_scale(tensor.base.scale)
    known = np.full(divisor.shape, False) if base is not None else divisor == 1
    return _Experts(tensor, base, divisor, np.ones_like(divisor), known)


def _pieces(size: int, width: int) -> Iterator[slice]:
    """Cut `size` rows of `width` elements into pieces."""
    step = max(1, _PIECE // width)
    return (slice(row, min(row + step, size)) for row in range(0, size, step))


def _fold_rows(weights: Array, scale: np.float32, native: Array, out: Array | None, rows: slice) -> bool:
    """Say whether rows of weights [H, I] fold to those columns of native [I, H]; if so, write them to out [H, I]."""
    piece = weights[rows]
    again = kernels.transpose_scale_cast(piece[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), native[:, rows].view(np.uint8)):
        return False
    if out is not None:
        kernels.scale_cast(piece, out=out[rows], threads=1)
    return True


def _divide_rows(
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
