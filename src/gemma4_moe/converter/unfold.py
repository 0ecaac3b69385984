"""The way back of the fold, with a base: an expert that is still the base's, folded, gets the base's weights and scale.

The base's expert is folded again, and its bits are compared with the native ones. An expert that differs keeps its own
bits, and its scale is one.

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
    from gemma4_moe.converter.base import BaseExperts
    from gemma4_moe.converter.plan import PlannedTensor

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are computed at once; a thread has up to 17 bytes for each.
_PIECE = 2**17


@dataclass(frozen=True, slots=True)
class _Experts:
    """What is known of the experts of one tensor.

    Attributes:
        source: The native tensor [E, I, H].
        base: The base's experts.
        base_scale: The base's scale of each, [E], fp32.
        scale: The scale that each is written with, [E], fp32.
        known: Whether that has been found, [E].
    """

    source: StoredTensor
    base: BaseExperts
    base_scale: Array
    scale: Array
    known: Array


class Unfolding:
    """The experts of one conversion on their way back. Used by one thread; use it as a context manager."""

    def __init__(self, tensors: Iterable[PlannedTensor], base_bytes: int, *, workers: int, buffered: bool) -> None:
        """Begin with nothing converted.

        Args:
            tensors: What is written. Those that have a base are unfolded.
            base_bytes: Size of the buffer for an expert of the base.
            workers: How many threads work on an expert.
            buffered: Whether to read the base, and what has to be read again, through the page cache.

        Raises:
            CheckpointFormatError, StorageError: What reading the base's scales raises.
        """
        self._experts = {tensor.name: experts for tensor in tensors if (experts := _begin(tensor)) is not None}
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
        """Write experts as the base's, or as they are, and remember which.

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
        for number in np.flatnonzero(~experts.known).tolist():
            native = self._read(experts.source, number, slice(0, experts.source.shape[1]), buffer)
            self._judge(experts, number, native, None)
        return experts.scale

    def _judge(self, experts: _Experts, number: int, native: Array, out: Array | None) -> bool:
        """Return whether an expert [I, H] is the base's, and remember it. If so, `out` holds its weights."""
        is_base = self._is_base(experts, number, native, out)
        if is_base:
            experts.scale[number] = experts.base_scale[number]
        experts.known[number] = True
        return is_base

    def _is_base(self, experts: _Experts, number: int, native: Array, out: Array | None) -> bool:
        """Return whether the base's expert folds to the native bits; if so, write it. Read as far as that takes."""
        weights, scale = experts.base.weights, experts.base_scale[number]
        size, width = weights.shape[1:]
        first = min(size, max(1, _FIRST // width))
        for rows in (slice(0, first), slice(0, size)):
            read = self._read(weights, number, rows, self._buffer)
            fold = partial(_fold_rows, read, scale, native, out)
            if not all(list(self._pool.map(fold, _pieces(rows.stop, width)))):
                return False
        return True

    def _read(self, stored: StoredTensor, expert: int, rows: slice, buffer: memoryview) -> Array:
        """Return rows of one expert of a tensor [E, R, C] of a file, in `buffer`."""
        file = stored.file
        if file.path not in self._readers:
            self._readers[file.path] = self._stack.enter_context(closing(file.reader(buffered=self._buffered)))
        _, size, width = stored.shape
        row = width * stored.dtype.itemsize
        start = stored.entry.start + (expert * size + rows.start) * row
        raw = self._readers[file.path].read(start, (rows.stop - rows.start) * row, buffer)
        return np.frombuffer(raw, np.uint8).view(stored.dtype.numpy()).reshape(-1, width)


def _begin(tensor: PlannedTensor) -> _Experts | None:
    """Return what is known before an expert is read; None without a base."""
    if tensor.base is None or tensor.source is None:
        return None
    base_scale = read_scale(tensor.base.scale)
    return _Experts(tensor.source, tensor.base, base_scale, np.ones_like(base_scale), np.full(base_scale.shape, False))


def _pieces(size: int, width: int) -> Iterator[slice]:
    """Cut `size` rows of `width` elements into pieces."""
    step = max(1, _PIECE // width)
    return (slice(row, min(row + step, size)) for row in range(0, size, step))


def _fold_rows(weights: Array, scale: np.float32, native: Array, out: Array | None, rows: slice) -> bool:
    """Return whether rows of weights [H, I] fold to those columns of native [I, H]; if so, write them to `out`."""
    piece = weights[rows]
    again = kernels.transpose_scale_cast(piece[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), native[:, rows].view(np.uint8)):
        return False
    if out is not None:
        kernels.scale_cast(piece, out=out[rows], threads=1)
    return True
