"""Two checkpoints of the same layout, tensor by tensor, whatever their spelling and the way they are cut into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import UnsupportedCheckpointError
from gemma4_moe.verifier.comparison import (
    DEFAULT_MEMORY,
    by_current_name,
    compare_form,
    elementwise,
    form_text,
    layout_of,
    present_in_one,
    run_jobs,
    summary,
)

if TYPE_CHECKING:
    from gemma4_moe.verifier.comparison import Progress, Verification


def diff(
    a: str | Path, b: str | Path, *, max_memory: int = DEFAULT_MEMORY, progress: Progress | None = None
) -> Verification:
    """Compare the tensors of checkpoint `b` with those of `a`, bit by bit; other files are not looked at.

    Args:
        a: The directory that says what should be.
        b: The directory that is judged.
        max_memory: The most bytes of buffers.
        progress: Told of the bytes of `b` that were compared so far, and of their total.

    Raises:
        InputError: One of them is not a checkpoint, or they are of different layouts.
        StorageError: The disk or its permissions refused.
        SourceChangedError: One of them changed while it was read.
        UsageError: The memory budget is too small.
    """
    a, b = Path(a), Path(b)
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        layouts = [layout_of(one), layout_of(other)]
        if layouts[0] is not layouts[1]:
            raise UnsupportedCheckpointError(
                "two checkpoints of different layouts",
                file=b,
                expected=f"the {layouts[0]} layout, as in {a}",
                found=f"the {layouts[1]} layout",
                hint="gemma4-moe verify compares a checkpoint with what it was converted from",
            )
        expected, found = (by_current_name(checkpoint, layouts[0]) for checkpoint in (one, other))
        differences = list(present_in_one({n: form_text(t.dtype.tag, t.shape) for n, t in expected.items()}, found))
        jobs = []
        for name, old in expected.items():
            new = found.get(name)
            if new is None:
                continue
            wrong = compare_form(new.name, (old.dtype, old.shape), (new.dtype, new.shape))
            differences += wrong
            if not wrong:
                jobs.append(elementwise(old, new))
        differences += run_jobs(jobs, max_memory, progress)
        one.check_unchanged()
        other.check_unchanged()
    return summary(a, b, len(expected.keys() | found.keys()), differences)
