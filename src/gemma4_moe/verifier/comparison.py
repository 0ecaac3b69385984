"""Two open checkpoints compared: by name, by header, and bit by bit through bounded buffers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.errors import DuplicateTensorError, UnsupportedCheckpointError, UsageError, command_line
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import Layout
from gemma4_moe.verifier.arithmetic import element_bits, reference
from gemma4_moe.verifier.differences import Difference, Mismatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.sizes import Progress
    from gemma4_moe.verifier.arithmetic import Bits

#: The most bytes of buffers.
DEFAULT_MEMORY = 64 * 2**20

#: How many elements are compared at once where no axes are exchanged.
_PIECE = 2**16

#: Bytes that a thread needs besides the buffers of its comparison, for results computed from one piece.
_THREAD_BYTES = 8 * 2**20

#: More threads than this only wait for the disk.
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """The result of `verify` with a source, and of `diff`.

    Attributes:
        source: The directory that says what should be.
        target: The directory that was judged.
        tensors: How many tensors the target has or should have.
        equal: How many of them are as they should be.
        different: Every difference. A tensor can have more than one, and a side file is not a tensor.
    """

    source: Path
    target: Path
    tensors: int
    equal: int
    different: tuple[Difference, ...]

    def __repr__(self) -> str:
        counts = f"{self.tensors:,} tensors, {self.equal:,} equal, {len(self.different):,} different"
        return f"<Verification of {self.target} with {self.source}: {counts}>"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison to make, of one tensor or of a few that belong together.

    Attributes:
        run: Makes it, with buffers of the given number of bytes.
        nbytes: Size of the target's tensors in bytes.
        least: The least bytes of buffers with which it can be made.
    """

    run: Callable[[int], list[Difference]]
    nbytes: int
    least: int = 0


def compare_all(comparisons: Sequence[Comparison], max_memory: int, progress: Progress | None) -> list[Difference]:
    """Make all comparisons and return the differences, in their order.

    Raises:
        UsageError: A comparison needs more memory.
        Exception: The first error of any comparison.
    """
    least = _THREAD_BYTES + max((comparison.least for comparison in comparisons), default=0)
    if least > max_memory:
        raise UsageError(
            "the memory budget is smaller than one expert of both checkpoints and its intermediate results",
            expected=f"at least {least} bytes",
            found=f"{max_memory} bytes",
            hint=f"give max_memory={least} or more",
        )
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max_memory // least)
    memory = max_memory // threads - _THREAD_BYTES
    total, done = sum(comparison.nbytes for comparison in comparisons), 0
    differences = []
    with ThreadPoolExecutor(threads, "gemma4-moe") as pool:
        results = pool.map(lambda comparison: comparison.run(memory), comparisons)
        for comparison, found in zip(comparisons, results, strict=True):
            differences += found
            done += comparison.nbytes
            if progress is not None:
                progress(done, total)
    return differences


def elementwise(expected: StoredTensor, found: StoredTensor) -> Comparison:
    """Return the comparison of two tensors of one shape, the first cast to the dtype of the second."""

    def run(_memory: int) -> list[Difference]:
        mismatches = Mismatches(found.shape, found.dtype)
        sizes = [element_bits(tensor.dtype).itemsize for tensor in (expected, found)]
        count = found.nbytes // sizes[1]
        for first in range(0, count, _PIECE):
            last = min(first + _PIECE, count)
            one, two = (read(t, first * size, last * size) for t, size in zip((expected, found), sizes, strict=True))
            mismatches.compare(reference(one, expected.dtype, found.dtype)[None], two[None], first)
        return mismatches.difference(found.name)

    return Comparison(run, found.nbytes)


def read(tensor: StoredTensor, start: int, end: int) -> Bits:
    """Return the elements in bytes [start, end) of a tensor. Both bounds are bounds of elements."""
    return read_into(np.empty(end - start, np.uint8), tensor, start)


def read_into(buffer: Bits, tensor: StoredTensor, start: int) -> Bits:
    """Fill a buffer with a tensor's bytes from byte `start` on, and return the buffer as elements."""
    tensor.read_into(memoryview(buffer.data), start)
    return buffer.view(element_bits(tensor.dtype))


def by_current_name(checkpoint: Checkpoint, layout: Layout) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by their names in the layout's current spelling.

    Raises:
        DuplicateTensorError: A tensor is in the checkpoint in two spellings.
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
                expected="each tensor in one spelling",
                found=f"also {tensors[name].name}",
                hint="get the checkpoint again, or save it again with the library that wrote it",
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
            hint=command_line("gemma4-moe", "inspect", checkpoint.path),
        )
    return found[0]


def present_in_one(expected: Mapping[str, str], found: Mapping[str, StoredTensor]) -> Iterable[Difference]:
    """Yield each missing and each extra tensor; `expected` maps a name to its dtype and shape as text."""
    for name, form in expected.items():
        if name not in found:
            yield Difference(name, "missing", form, None)
    for name, tensor in found.items():
        if name not in expected:
            yield Difference(tensor.name, "extra", None, form_text(tensor.dtype.tag, tensor.shape))


def form_text(dtype: str, shape: tuple[int, ...]) -> str:
    """Return a tensor's dtype and shape as text."""
    return f"{dtype} {list(shape)}"


def compare_form(
    name: str, expected: tuple[DType, tuple[int, ...]], found: tuple[DType, tuple[int, ...]]
) -> list[Difference]:
    """Return how dtype and shape differ from those expected."""
    differences = []
    if expected[0] != found[0]:
        differences.append(Difference(name, "dtype", expected[0].tag, found[0].tag))
    if expected[1] != found[1]:
        differences.append(Difference(name, "shape", str(list(expected[1])), str(list(found[1]))))
    return differences


def summary(source: Path, target: Path, names: int, differences: Iterable[Difference]) -> Verification:
    """Return the result for a target that has or should have `names` tensors."""
    different = tuple(differences)
    wrong = {difference.name for difference in different if difference.kind != "file"}
    return Verification(source, target, names, names - len(wrong), different)
