"""Two checkpoints of one layout, or two adapters of one form, compared tensor by tensor."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import layout_of
from gemma4_moe.errors import UnsupportedCheckpointError, command_line
from gemma4_moe.hub.source import check_streamed, is_hub_id
from gemma4_moe.lora.config import is_adapter
from gemma4_moe.sizes import parse_size
from gemma4_moe.verifier.adapters import diff_adapters
from gemma4_moe.verifier.comparison import DEFAULT_MEMORY, by_current_name, compare, open_side
from gemma4_moe.verifier.expected import Expectation

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.sizes import Progress
from gemma4_moe.verifier.comparison import Verification


def diff(
    a: str | Path,
    b: str | Path,
    *,
    stream: bool = False,
    max_memory: int | str = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Verification:
    """Compare the tensors of checkpoint `b` with those of `a`, bit by bit; other files are not compared.

    Spellings and files may differ. Of two adapters in one form, the scaling of each module is compared too.

    Args:
        a: The checkpoint that says what should be: a directory, or a Hub id; or an adapter's directory.
        b: The checkpoint that is judged, likewise.
        stream: Read models on the Hub there, without a copy in the Hub's cache.
        max_memory: The most bytes of buffers, or text such as "512MiB".
        progress: Called with the bytes of `b` that were compared so far and with their total.

    Raises:
        InputError: One of them is not a checkpoint, its publish was interrupted, or their layouts or forms differ.
        StorageError: The disk or its permissions refused.
        SourceChangedError: A file changed while it was read.
        UsageError: The memory budget is too small or no size; or neither of two that are to be streamed is on the Hub.
    """
    memory = parse_size(max_memory)
    if stream:
        check_streamed(a, b)
    if all(not is_hub_id(each) and is_adapter(expanded(each)) for each in (a, b)):
        return diff_adapters(expanded(a), expanded(b), memory, progress)
    with ExitStack() as stack:
        one, other = (open_side(stack, each, stream=stream) for each in (a, b))
        layout, its_layout = (layout_of(checkpoint.tensors, checkpoint.path) for checkpoint in (one, other))
        if layout is not its_layout:
            raise UnsupportedCheckpointError(
                "two checkpoints of different layouts",
                file=other.path,
                expected=f"the {layout} layout, as in {a}",
                found=f"the {its_layout} layout",
                hint=command_line("gemma4-moe", "verify", *(["--stream"] if stream else []), a, b),
            )
        expected = {name: Expectation(tensor, tensor.shape) for name, tensor in by_current_name(one, layout).items()}
        found = by_current_name(other, layout)
        return compare(one, other, expected, found, cast=None, max_memory=memory, progress=progress)
