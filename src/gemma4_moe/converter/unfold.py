"""The way back of the fold, with a base: an expert that is still the base's, folded, gets the base's weights and scale.

The base's expert is folded again, and its bits are compared with the native ones. An expert that differs keeps its own
bits, and its scale is one.

An expert is judged once, while its block is converted. The outcome is a fact of the block in the journal; the
scales [E] are written after all blocks, from the facts of all ranks and runs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.converter.scales import read_scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.readers import Reader
    from gemma4_moe.converter.plan import PlannedTensor
    from gemma4_moe.layout.targets import Source

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are computed at once; a thread has up to 17 bytes for each.
_PIECE = 2**17


class Unfolding:
    """Gives experts back to their base. Used by one thread; use it as a context manager."""

    def __init__(self, tensors: Iterable[PlannedTensor], base_bytes: int, *, workers: int, buffered: bool) -> None:
        """Read the base's scales.

        Args:
            tensors: The target's tensors; those that have a base are unfolded.
            base_bytes: Size of the buffer for an expert of the base.
            workers: How many threads work on an expert.
            buffered: Whether to read the base through the page cache.

        Raises:
            CheckpointFormatError, StorageError: What reading the base's scales raises.
        """
        self._scales = {
            tensor.name: read_scale(tensor.base.scale).astype(np.float32)
            for tensor in tensors
            if tensor.base is not None
        }
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

    def convert(self, tensor: PlannedTensor, first: int, native: Array, out: Array) -> list[int]:
        """Write experts as the base's, or as they are, and return the numbers of those that are the base's.

        Args:
            tensor: The target's tensor, a `down_proj` with a base.
            first: The number of the first expert.
            native: The experts, [n, I, H].
            out: Where to write them, [n, H, I].

        Raises:
            CheckpointFormatError, StorageError: What reading the base raises.
        """
        given_back = []
        for number, (expert, into) in enumerate(zip(native, out, strict=True), first):
            if self._is_base(tensor, number, expert, into):
                given_back.append(number)
            else:
                kernels.transpose_scale_cast(expert, out=into, threads=self._workers)
        return given_back

    def _is_base(self, tensor: PlannedTensor, number: int, native: Array, out: Array) -> bool:
        """Return whether the base's expert folds to the native bits; if so, write it. Read as far as that takes."""
        assert tensor.base is not None, "the caller has looked"
        weights, scale = tensor.base.weights, self._scales[tensor.name][number]
        size, width = weights.shape[1:]
        first = min(size, max(1, _FIRST // width))
        for rows in (slice(0, first), slice(0, size)):
            own = self._read(weights, number, rows)
            fold = partial(_fold_rows, own, scale, native, out)
            if not all(list(self._pool.map(fold, _pieces(rows.stop, width)))):
                return False
        return True

    def _read(self, weights: Source[StoredTensor], expert: int, rows: slice) -> Array:
        """Return rows of one expert of a tensor [E, R, C] of the base; valid until the next call."""
        (read,) = weights.reads(expert, expert + 1)  # no form cuts the rows of a down_proj
        file = read.stored.file
        if file.path not in self._readers:
            self._readers[file.path] = self._stack.enter_context(closing(file.reader(buffered=self._buffered)))
        width = weights.shape[2]
        row = width * weights.dtype.itemsize
        start = read.stored.entry.start + read.start + rows.start * row
        raw = self._readers[file.path].read(start, (rows.stop - rows.start) * row, self._buffer)
        return np.frombuffer(raw, np.uint8).view(weights.dtype.numpy()).reshape(-1, width)


def _pieces(size: int, width: int) -> Iterator[slice]:
    """Cut `size` rows of `width` elements into pieces."""
    step = max(1, _PIECE // width)
    return (slice(row, min(row + step, size)) for row in range(0, size, step))


def _fold_rows(weights: Array, scale: np.float32, native: Array, out: Array, rows: slice) -> bool:
    """Return whether rows of weights [H, I] fold to those columns of native [I, H]; if so, write them to `out`."""
    piece = weights[rows]
    again = kernels.transpose_scale_cast(piece[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), native[:, rows].view(np.uint8)):
        return False
    kernels.scale_cast(piece, out=out[rows], threads=1)
    return True
