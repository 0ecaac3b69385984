"""Two checkpoints opened and compared: tensors by name, dtypes and shapes, then bits by several threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.threads import SharedIterator, run_in_threads
from gemma4_moe.checkpoint.values import Oddities, scales_of, value_notes
from gemma4_moe.errors import DuplicateTensorError, UsageError
from gemma4_moe.hub.remote import commit_of
from gemma4_moe.hub.source import is_hub_id, locate, open_source
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import Layout
from gemma4_moe.target.recovery import check_published
from gemma4_moe.verifier.assembled import assembled
from gemma4_moe.verifier.differences import fold_differences
from gemma4_moe.verifier.expected import compare_headers
from gemma4_moe.verifier.refolded import refolds
from gemma4_moe.verifier.values import comparisons

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import ExitStack

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.spellings import Part
    from gemma4_moe.sizes import Progress
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference, FoldedDifference
    from gemma4_moe.verifier.expected import Expectation
    from gemma4_moe.verifier.values import Comparison

#: The most bytes of buffers.
DEFAULT_MEMORY = 64 * 2**20

#: Bytes that a thread needs besides the buffers of its comparison, for results computed from one piece.
_THREAD_BYTES = 8 * 2**20

#: More threads than this only wait for the disk.
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """The result of `verify` with a source, and of `diff`.

    Attributes:
        source: The directory that says what should be; of a model that was read on the Hub, its id and commit.
        target: The directory that was judged, likewise.
        tensors: How many tensors the target has or should have.
        equal: How many of them are as they should be.
        different: Every difference. A tensor can have more than one, and a side file is not a tensor.
        files: How many side files of the source were looked for in the target.
        notes: Sentences on odd values of the source: NaN, infinities, experts that are all zero or equal to another,
            scales that are zero, negative or not finite.
    """

    source: Path
    target: Path
    tensors: int
    equal: int
    different: tuple[Difference, ...]
    files: int = 0
    notes: tuple[str, ...] = ()

    @property
    def different_tensors(self) -> int:
        """How many tensors are not as they should be, missing and extra ones included."""
        return self.tensors - self.equal

    @property
    def different_files(self) -> int:
        """How many side files are missing or have other bytes."""
        return sum(difference.kind == "file" for difference in self.different)

    @property
    def folds(self) -> list[FoldedDifference]:
        """The differences of tensors, folded over layers."""
        return fold_differences(self.different)

    def __repr__(self) -> str:
        counts = f"{self.tensors:,} tensors, {self.equal:,} equal, {self.different_tensors:,} different"
        return f"<Verification of {self.target} with {self.source}: {counts}>"


def open_side(
    stack: ExitStack, checkpoint: str | Path, revision: str | None = None, *, stream: bool = False
) -> Checkpoint:
    """Open a checkpoint of a comparison on a stack that closes it: a directory, or a model on the Hub.

    If `stream`, a model on the Hub is read there. Otherwise it is downloaded into the Hub's cache first.

    Raises:
        UsageError, InputError, StorageError: As `locate`, `check_published` and `open_source` raise them.
    """
    if stream and is_hub_id(checkpoint):
        return stack.enter_context(open_source(checkpoint, revision, stream=True))
    path = locate(checkpoint, revision)
    check_published(path)
    return stack.enter_context(open_checkpoint(path))


def compare(
    source: Checkpoint,
    target: Checkpoint,
    expected: Mapping[str, Expectation],
    found: Mapping[str, Values],
    *,
    cast: DType | None,
    max_memory: int,
    progress: Progress | None,
) -> Verification:
    """Compare the tensors that are expected with those of the target, both by name in current spelling.

    `cast` is the one dtype to which floating-point tensors may have been cast. Errors are those of `compare_all`.
    """
    differences, comparable = compare_headers(expected, found, cast)
    odd = Oddities()
    pending = [*comparisons(expected, comparable, odd), *refolds(expected, comparable, odd)]
    differences += compare_all(pending, max_memory, progress)
    odd.compare(source.tensors, max_memory)
    source.check_unchanged()
    target.check_unchanged()
    tensors = len(expected.keys() | found.keys())
    wrong = {difference.name for difference in differences}
    notes = value_notes(odd.document(), scales_of(source, Layout.HF))
    equal = tensors - len(wrong)
    return Verification(_place(source), _place(target), tensors, equal, tuple(differences), notes=notes)


def _place(checkpoint: Checkpoint) -> Path:
    """Return a checkpoint's directory, or the id and the commit of a model that is read on the Hub."""
    return checkpoint.path if commit_of(checkpoint) is None else Path(*checkpoint.path.parts[-2:])


def compare_all(pending: Sequence[Comparison], max_memory: int, progress: Progress | None) -> list[Difference]:
    """Make all comparisons and return the differences, in their order.

    Raises:
        UsageError: A comparison needs more memory.
        Exception: The first error of any comparison.
    """
    least = _THREAD_BYTES + max((comparison.least for comparison in pending), default=0)
    if least > max_memory:
        raise UsageError(
            "the memory budget is smaller than one expert of both checkpoints and its intermediate results",
            expected=f"at least {least} bytes",
            found=f"{max_memory} bytes",
            hint=f"give max_memory={least} or more",
        )
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max_memory // least)
    memory = max_memory // threads - _THREAD_BYTES
    total, done = sum(comparison.nbytes for comparison in pending), 0
    jobs, telling = SharedIterator(enumerate(pending)), Lock()
    differences: list[list[Difference]] = [[] for _ in pending]

    def work(check: Callable[[], None]) -> None:
        nonlocal done
        for number, comparison in jobs:
            check()
            differences[number] = comparison.run(memory, check)
            with telling:
                done += comparison.nbytes
                if progress is not None:
                    progress(done, total)

    run_in_threads(threads, work)
    return [difference for found in differences for difference in found]


def by_current_name(checkpoint: Checkpoint, layout: Layout) -> dict[str, Values]:
    """Return a checkpoint's tensors by their names in the layout's current spelling.

    Raises:
        DuplicateTensorError: A tensor is in the checkpoint in two spellings.
    """
    names = {name: lookup(name, layout) for name in checkpoint.tensors}
    places: dict[tuple[str, Part], str] = {}
    for own, explained in names.items():
        place = (own, WHOLE) if explained is None else (explained.name(layout), explained.part)
        if (first := places.setdefault(place, own)) != own:
            raise DuplicateTensorError(
                "two spellings of one tensor",
                tensor=own,
                file=checkpoint.tensors[own].file.path,
                expected="each tensor in one spelling",
                found=f"also {first}",
                hint="get the checkpoint again, or save it again with the library that wrote it",
            )
    found = assembled(checkpoint.tensors, names, layout)
    return {own if name is None else name.name(layout): tensor for own, (name, tensor) in found.items()}
