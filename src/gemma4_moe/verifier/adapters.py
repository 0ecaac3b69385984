"""Two adapters of one form compared: the bits of their tensors, and the scaling of each module."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.values import Oddities, value_notes
from gemma4_moe.errors import UnsupportedCheckpointError, command_line
from gemma4_moe.lora.opening import open_adapter, stored_in
from gemma4_moe.verifier.comparison import Verification, compare_all
from gemma4_moe.verifier.differences import Difference
from gemma4_moe.verifier.expected import Expectation, compare_headers
from gemma4_moe.verifier.values import comparisons

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gemma4_moe.lora.opening import Adapter
    from gemma4_moe.sizes import Progress


def diff_adapters(a: Path, b: Path, memory: int, progress: Progress | None) -> Verification:
    """Compare adapter `b` with `a`. Arguments and errors are those of `diff`."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(open_adapter(path)) for path in (a, b))
        if (one.form, one.layout) != (other.form, other.layout):
            raise UnsupportedCheckpointError(
                "two adapters of different forms",
                file=b,
                expected=_form(one),
                found=_form(other),
                hint=command_line("gemma4-moe", "lora", b, f"{b.name}-{one.form}", "--to", one.form),
            )
        expected = {name: Expectation(tensor, tensor.shape) for name, tensor in stored_in(one.file).items()}
        found = stored_in(other.file)
        differences, comparable = compare_headers(expected, found, None)
        odd = Oddities()
        differences += compare_all(list(comparisons(expected, comparable, odd)), memory, progress)
        wrong, tensors = {difference.name for difference in differences}, len(expected.keys() | found.keys())
        for adapter in (one, other):
            adapter.file.check_unchanged()
        notes = value_notes(odd.document(), {})
        different = (*differences, *_scalings(one, other))
        return Verification(a, b, tensors, tensors - len(wrong), different, notes=notes)


def _form(adapter: Adapter) -> str:
    return f"{adapter.form}'s form" + ("" if adapter.layout is None else f" ({adapter.layout})")


def _scalings(one: Adapter, other: Adapter) -> Iterator[Difference]:
    for name in (name for name in one.modules if name in other.modules):
        expected, found = (adapter.scaling_of(adapter.modules[name]) for adapter in (one, other))
        if expected != found:
            yield Difference(name, "scaling", f"{expected:g}", f"{found:g}")
