"""The way back of the fold: which experts of a native tensor can be written as the weights and scale they came from.

An expert is written as (w̃, s) exactly if fold(w̃, s) has its native bits, where s is what the source's manifest names
and w̃ is native / s, rounded to the dtype that the manifest names; otherwise as its native bits with the scale one.
Nothing is believed of a manifest, and no division is trusted: the candidate is folded again, and bits are compared.
A scale that is zero or not finite divides nothing out.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoints.direct_io import SLACK, allocate
from gemma4_moe.dtypes import FLOAT32
from gemma4_moe.errors import SourceChangedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemma4_moe.checkpoints.direct_io import Reader
    from gemma4_moe.checkpoints.directories import StoredTensor
    from gemma4_moe.checkpoints.manifest import Folded
    from gemma4_moe.dtypes import DType

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are looked at, or computed, at once; a thread has up to 17 bytes for each.
_PIECE = 2**18


@dataclass(frozen=True, slots=True)
class Candidate:
    """One expert that might be unfolded.

    Attributes:
        name: What its tensor is called in the target.
        source: The native tensor [E, I, H].
        expert: Its number.
        scale: The scale that the manifest names.
        folded: The dtype that the manifest names.
        target: The dtype that it is to be written in.
    """

    name: str
    source: StoredTensor
    expert: int
    scale: np.float32
    folded: DType
    target: DType


def candidates(name: str, source: StoredTensor, folded: Folded, target: DType) -> Iterator[Candidate]:
    """Yield the experts of `source` whose scale can be divided by and is a value of `target`; one is no question."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.array(folded.scale).astype(np.float32)
        held = scale.astype(target.numpy()).astype(np.float32)
    for expert in np.flatnonzero((held == folded.scale) & np.isfinite(scale) & (scale != 0) & (scale != 1)):
        yield Candidate(name, source, int(expert), scale[expert], folded.dtype, target)


def judge_experts(experts: Sequence[Candidate], *, buffered: bool, threads: int) -> list[bool]:
    """Say of each expert whether w̃ folds to its native bits. One that doesn't is read up to the first that differ.

    Raises:
        CheckpointFormatError, StorageError: What reading the source raises.
    """
    jobs = iter(range(len(experts)))
    taking = Lock()
    found = [False] * len(experts)

    def work() -> None:
        buffer = allocate(_PIECE * FLOAT32.itemsize + SLACK)
        readers: dict[str, Reader] = {}
        with ExitStack() as stack:
            while True:
                with taking:
                    number = next(jobs, None)
                if number is None:
                    return
                expert = experts[number]
                file = expert.source.file
                if file.path.name not in readers:
                    readers[file.path.name] = stack.enter_context(closing(file.reader(buffered=buffered)))
                found[number] = _is_unfolded(expert, readers[file.path.name], buffer)

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work) for _ in range(min(threads, len(experts)))]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            jobs = iter(())  # after a failure or an interrupt, the others stop at their next expert
        for future in futures:
            future.result()
    return found


def unfold_experts(native: Array, scale: Array, folded: DType, out: Array, threads: int) -> None:
    """Write experts as they were judged: out [n, H, I] from native [n, I, H], each expert w̃, or itself where s is one.

    Args:
        native: The experts.
        scale: What each is written with, [n], fp32.
        folded: The dtype that the manifest names.
        out: Where to write them.
        threads: Threads of the kernel.

    Raises:
        SourceChangedError: An expert is not the one that was judged.
    """
    rows = max(1, _PIECE // native.shape[2])
    for expert, factor in enumerate(scale):
        if factor == 1:
            kernels.transpose_scale_cast(native[expert], out=out[expert], threads=threads)
            continue
        for row in range(0, native.shape[1], rows):
            piece = native[expert, row : row + rows]
            weights, same = _unfold(piece.reshape(-1), factor, folded, out.dtype)
            if not same:
                raise SourceChangedError(
                    "the source changed after it was looked at",
                    expected=f"experts that fold to their native bits with the scale {factor}",
                    found="other bits",
                    hint="let nothing write the source, and start again",
                )
            kernels.transpose_scale_cast(
                weights.reshape(piece.shape), out=out[expert, :, row : row + rows], threads=threads
            )


def _unfold(native: Array, scale: np.float32, folded: DType, target: np.dtype[Any]) -> tuple[Array, bool]:
    """Return w̃ [n] of native [n] in the dtype `target`, and whether it folds to the same bits."""
    quotient = kernels.scale_cast(native, dtype=np.float32, threads=1)
    with np.errstate(all="ignore"):  # Inf and NaN are values like others
        np.divide(quotient, scale, out=quotient)
    rounded = kernels.scale_cast(quotient, dtype=folded.numpy(), threads=1)
    weights = kernels.scale_cast(rounded, dtype=target, threads=1)
    again = kernels.scale_cast(weights[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    return weights, np.array_equal(again.view(np.uint8), native.view(np.uint8))


def _is_unfolded(expert: Candidate, reader: Reader, buffer: memoryview) -> bool:
    target = expert.target.numpy()
    pieces = _pieces(expert, reader, buffer)
    return all(_unfold(piece, expert.scale, expert.folded, target)[1] for piece in pieces)


def _pieces(expert: Candidate, reader: Reader, buffer: memoryview) -> Iterator[Array]:
    """Yield an expert's elements in order, each piece valid until the next is asked for."""
    source = expert.source
    itemsize = source.dtype.itemsize
    count = source.nbytes // itemsize // source.shape[0]
    start, first = source.entry.start + expert.expert * count * itemsize, 0
    while first < count:
        last = min(first + (_PIECE if first else _FIRST), count)
        raw = reader.read(start + first * itemsize, (last - first) * itemsize, buffer)
        yield np.frombuffer(raw, np.uint8).view(source.dtype.numpy())
        first = last
