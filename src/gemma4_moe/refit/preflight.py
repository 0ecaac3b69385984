"""The check that engines don't make before they load: a stream has every tensor of the engine, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import DifferenceError
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.spellings.per_expert import PER_EXPERT
from gemma4_moe.layout.spellings.unfused import UNFUSED
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gemma4_moe.layout.names import MoEName
    from gemma4_moe.refit.items import Planned

#: Shapes by name; None where only the name is known.
Shapes = dict[str, "tuple[int, ...] | None"]


def check_against(
    plan: Iterable[Planned], aliases: Mapping[str | None, str | None], reference: str | Path | Iterable[Any]
) -> None:
    """Compare a plan with a reference. `reference` and errors are those of `WeightStream.preflight`.

    `aliases` has, for each other name of a tied tensor, the name that it is sent under.
    """
    sent: Shapes = {planned.name: planned.shape for planned in plan}
    wanted = _shapes(reference)
    if any(_is_single(name) for name in sent) != any(_is_single(name) for name in wanted):
        sent, wanted = _by_expert(sent), _by_expert(wanted)
    lacks = [name for name in wanted if name not in sent and aliases.get(name) not in sent]
    extra = [name for name in sent if name not in wanted]
    other = [
        f"{name}: {list(sent[name] or ())} instead of {list(shape)}"
        for name, shape in wanted.items()
        if shape is not None and name in sent and sent[name] != shape
    ]
    if lacks or extra or other:
        kinds = {"left out": lacks, "not known to the engine": extra, "of another shape": other}
        lines = [f"{kind}: {text}" for kind, texts in kinds.items() for text in texts]
        raise DifferenceError(
            "the stream is not what the engine has: " + "; ".join(lines),
            expected=f"{len(wanted)} tensors",
            found=", ".join(f"{len(texts)} {kind}" for kind, texts in kinds.items()),
            hint="an engine goes on with old or random weights where a tensor is left out: give the stream the whole "
            "state, buffers included, without layers or exclude_key_regex",
        )


def _shapes(reference: str | Path | Iterable[Any]) -> Shapes:
    """Return names, in current spelling, and shapes of a reference."""
    if isinstance(reference, str | Path):
        with open_checkpoint(Path(reference)) as checkpoint:
            reference = [(name, stored.shape) for name, stored in checkpoint.tensors.items()]
    found: Shapes = {}
    for entry in reference:
        name, shape = (entry, None) if isinstance(entry, str) else (entry[0], tuple(entry[1]))
        parsed = lookup(name, Layout.HF)
        found[name if parsed is None else _current(parsed)] = shape
    return found


def _current(name: MoEName) -> str:
    """Return a name in current spelling; that of one expert's tensor in the form that engines load."""
    rule, part = name.rule, name.part
    if part == WHOLE:
        return name.hf
    form = UNFUSED if part.expert is None else PER_EXPERT
    return name.layer_path + form.templates(rule)[part.slot].format(part.expert)


def _by_expert(shapes: Shapes) -> Shapes:
    """Return the same shapes, with the tensors of single experts in the place of each fused tensor of known shape."""
    found: Shapes = {}
    for name, shape in shapes.items():
        parsed = lookup(name, Layout.HF)
        if parsed is None or not parsed.rule.is_matrices or shape is None or len(shape) != 3:
            found[name] = shape
        else:
            for rest, part in PER_EXPERT.parts(parsed.rule, shape[0]):
                found[parsed.layer_path + rest] = part.shape(shape)
    return found


def _is_single(name: str) -> bool:
    """Return whether a name is that of one expert's tensor."""
    found = lookup(name, Layout.HF)
    return found is not None and found.part.expert is not None
