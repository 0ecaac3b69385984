"""Two open checkpoints compared: by name, by header, and bit by bit through bounded buffers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.errors import DuplicateTensorError, UnsupportedCheckpointError, UsageError
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import Layout
from gemma4_moe.verifier.arithmetic import element_bits, reference
from gemma4_moe.verifier.differences import Difference, Mismatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.verifier.arithmetic import Bits

    #: Told of the bytes of the target that were compared so far, and of their total.
    Progress = Callable[[int, int], object]

#: The most bytes of buffers.
DEFAULT_MEMORY = 64 * 2**20

#: How many elements are compared at once where no axes are exchanged.
_PIECE = 2**16

#: What a thread needs besides the buffers of its job, in bytes: what it computes from one piece.
_BESIDE = 8 * 2**20

#: More threads than this only wait for the disk.
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Verification:
    """What a comparison of two checkpoints found.

    Attributes:
        source: The directory that says what should be.
        target: The directory that was judged.
        tensors: How many tensors the target has or should have.
        equal: How many of them are as they should be.
        different: All that is not; a tensor may be wrong in more than one way, and a side file is no tensor.
    """

    source: Path
    target: Path
    tensors: int
    equal: int
    different: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """The comparison of one tensor, or of a few that belong together.

    Attributes:
        run: Does it, with buffers of the given number of bytes.
        nbytes: Size of the target's tensors in bytes.
        least: The least bytes of buffers with which it can be done.
    """

    run: Callable[[int], list[Difference]]
    nbytes: int
    least: int = 0


def run_jobs(jobs: Sequence[Job], max_memory: int, progress: Progress | None) -> list[Difference]:
    """Do all jobs and return what they found, in their order.

    Raises:
        UsageError: A job needs more memory.
        Whatever a job raised first.
    """
    least = _BESIDE + max((job.least for job in jobs), default=0)
    if least > max_memory:
        raise UsageError(
            "the memory budget is smaller than one expert of both checkpoints and what is computed from it",
            expected=f"at least {least} bytes",
            found=f"{max_memory} bytes",
        )
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max_memory // least)
    memory = max_memory // threads - _BESIDE
    total, done = sum(job.nbytes for job in jobs), 0
    differences = []
    with ThreadPoolExecutor(threads, "gemma4-moe") as pool:
        for job, found in zip(jobs, pool.map(lambda job: job.run(memory), jobs), strict=True):
            differences += found
            done += job.nbytes
            if progress is not None:
                progress(done, total)
    return differences


def elementwise(expected: StoredTensor, found: StoredTensor) -> Job:
    """Return the job that compares two tensors of one shape, the first cast to the dtype of the second."""

    def run(_memory: int) -> list[Difference]:
        mismatches = Mismatches(found.shape, found.dtype)
        sizes = [element_bits(tensor.dtype).itemsize for tensor in (expected, found)]
        count = found.nbytes // sizes[1]
        for first in range(0, count, _PIECE):
            last = min(first + _PIECE, count)
            one, two = (read(t, first * size, last * size) for t, size in zip((expected, found), sizes, strict=True))
            mismatches.compare(reference(one, expected.dtype, found.dtype)[None], two[None], first)
        return mismatches.difference(found.name)

    return Job(run, found.nbytes)


def read(tensor: StoredTensor, start: int, end: int) -> Bits:
    """Return the elements in bytes [start, end) of a tensor, which are whole elements."""
    return read_into(np.empty(end - start, np.uint8), tensor, start)


def read_into(buffer: Bits, tensor: StoredTensor, start: int) -> Bits:
    """Fill a buffer of bytes with those of a tensor from byte `start` on, and return it as elements."""
    tensor.read_into(memoryview(buffer.data), start)
    return buffer.view(element_bits(tensor.dtype))


def by_current_name(checkpoint: Checkpoint, layout: Layout) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by their names in the layout's current spelling.

    Raises:
        DuplicateTensorError: One tensor is there in both spellings.
    """
    tensors: dict[str, StoredTensor] = {}
    for tensor in checkpoint.tensors.values():
        explained = lookup(tensor.name, layout)
        name = tensor.name if explained is None else explained.name(layout)
        if name in tensors:
            raise DuplicateTensorError(
                "two spellings of one tensor",
                tensor=tensor.name,
                file=tensor.file.path,
                found=f"also {tensors[name].name}",
                hint="keep one of them",
            )
        tensors[name] = tensor
    return tensors


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Return the layout that a checkpoint's names belong to.

    Raises:
        UnsupportedCheckpointError: They belong to both layouts, or to none.
    """
    found = [layout for layout in Layout if any(lookup(name, layout) for name in checkpoint.tensors)]
    if len(found) != 1:
        raise UnsupportedCheckpointError(
            "names of both layouts in one checkpoint" if found else "no mixture-of-experts layer in this checkpoint",
            file=checkpoint.path,
            expected="the names of one layout, hf or nemo",
            found=f"{len(checkpoint.tensors)} tensors",
            hint="look at it with gemma4-moe inspect",
        )
    return found[0]


def present_in_one(expected: Mapping[str, str], found: Mapping[str, StoredTensor]) -> Iterable[Difference]:
    """Yield what is missing or extra; `expected` says for each tensor what it should be."""
    for name, form in expected.items():
        if name not in found:
            yield Difference(name, "missing", form, None)
    for name, tensor in found.items():
        if name not in expected:
            yield Difference(tensor.name, "extra", None, form_text(tensor.dtype.tag, tensor.shape))


def form_text(dtype: str, shape: tuple[int, ...]) -> str:
    """Show what a header says of a tensor."""
    return f"{dtype} {list(shape)}"


def compare_form(
    name: str, expected: tuple[DType, tuple[int, ...]], found: tuple[DType, tuple[int, ...]]
) -> list[Difference]:
    """Compare dtype and shape."""
    differences = []
    if expected[0] != found[0]:
        differences.append(Difference(name, "dtype", expected[0].tag, found[0].tag))
    if expected[1] != found[1]:
        differences.append(Difference(name, "shape", str(list(expected[1])), str(list(found[1]))))
    return differences


def summary(source: Path, target: Path, names: int, differences: Iterable[Difference]) -> Verification:
    """Return the whole finding on a target that has or should have `names` tensors."""
    different = tuple(differences)
    wrong = {difference.name for difference in different if difference.kind != "file"}
    return Verification(source, target, names, names - len(wrong), different)
