"""Two checkpoints of the same layout compared tensor by tensor; spellings and files may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import UnsupportedCheckpointError, command_line
from gemma4_moe.hub.source import locate
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.recovery import check_published
from gemma4_moe.verifier.comparison import (
    DEFAULT_MEMORY,
    by_current_name,
    compare_all,
    compare_form,
    elementwise,
    form_text,
    layout_of,
    present_in_one,
    summary,
)

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.sizes import Progress
    from gemma4_moe.verifier.comparison import Verification


def diff(
    a: str | Path, b: str | Path, *, max_memory: int | str = DEFAULT_MEMORY, progress: Progress | None = None
) -> Verification:
    """Compare the tensors of checkpoint `b` with those of `a`, bit by bit; other files are not compared.

    Args:
        a: The checkpoint that says what should be: a directory, or a Hub id.
        b: The checkpoint that is judged, likewise.
        max_memory: The most bytes of buffers, or text such as "512MiB".
        progress: Called with the bytes of `b` that were compared so far and with their total.

    Raises:
        InputError: One of them is not a checkpoint, its publish was interrupted, or their layouts differ.
        StorageError: The disk or its permissions refused.
        SourceChangedError: A file changed while it was read.
        UsageError: The memory budget is too small or no size.
    """
    memory = parse_size(max_memory)
    a, b = locate(a), locate(b)
    check_published(a)
    check_published(b)
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        layouts = [layout_of(one), layout_of(other)]
        if layouts[0] is not layouts[1]:
            raise UnsupportedCheckpointError(
                "two checkpoints of different layouts",
                file=b,
                expected=f"the {layouts[0]} layout, as in {a}",
                found=f"the {layouts[1]} layout",
                hint=command_line("gemma4-moe", "verify", a, b),
            )
        expected, found = (by_current_name(checkpoint, layouts[0]) for checkpoint in (one, other))
        differences = list(present_in_one({n: form_text(t.dtype.tag, t.shape) for n, t in expected.items()}, found))
        comparisons = []
        for name, old in expected.items():
            new = found.get(name)
            if new is None:
                continue
            wrong = compare_form(new.name, (old.dtype, old.shape), (new.dtype, new.shape))
            differences += wrong
            if not wrong:
                comparisons.append(elementwise(old, new))
        differences += compare_all(comparisons, memory, progress)
        one.check_unchanged()
        other.check_unchanged()
    return summary(a, b, len(expected.keys() | found.keys()), differences)
