"""Names of tensors: the row and layer that a name means, names in natural order, and names folded over layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.layout import spellings
from gemma4_moe.layout.foreign import foreign_spelling
from gemma4_moe.layout.lora import NATIVE_EXPERT_LORA, is_lora
from gemma4_moe.layout.spellings import CURRENT, WHOLE, Part, Spelling
from gemma4_moe.layout.table import MOE_MODULES, RULES, Layout, Rule, lora_rule

if TYPE_CHECKING:
    from collections.abc import Iterable


#: The key of a layer: its prefix and its number. Two towers may both have a layer 0.
LayerKey = tuple[str, int]

#: The prefixes of published models: multimodal, text-only, and as some tools write them.
PUBLISHED_PREFIXES = ("model.language_model.", "model.", "language_model.", "")

_NEMO_ROWS = {rule.nemo: rule for rule in RULES if rule.in_nemo}

_IN_LAYER = re.compile(r"(?P<prefix>(?:.+\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,8})\.(?P<rest>.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class MoEName:
    """A name that a row of the table explains.

    Attributes:
        prefix: Everything before `layers.`, its dot included.
        spelling: The published form that has this name.
        part: The share of the row's tensor that it holds.
    """

    prefix: str
    layer: int
    rule: Rule
    spelling: Spelling = CURRENT
    part: Part = WHOLE

    @property
    def layer_key(self) -> LayerKey:
        """The key of its layer."""
        return self.prefix, self.layer

    @property
    def layer_path(self) -> str:
        """The name of the layer, with its last dot."""
        return f"{self.prefix}layers.{self.layer}."

    @property
    def hf(self) -> str:
        """The whole name in the hf layout, current spelling."""
        return self.name(Layout.HF)

    @property
    def nemo(self) -> str:
        """The whole name in the nemo layout; for the scale, that of the tensor that takes it in."""
        return self.name(Layout.NEMO)

    def name(self, layout: Layout) -> str:
        """Return the whole name in `layout`, current spelling."""
        return self.layer_path + self.rule.name(layout)

    def sibling(self, rule: Rule) -> MoEName:
        """Return the name of another row in the same layer, current spelling."""
        return MoEName(self.prefix, self.layer, rule)


def lookup(name: str, layout: Layout) -> MoEName | None:
    """Return the row that explains `name` in `layout` and its layer, or None if no row does."""
    return _lookup(name, layout, spellings.SPELLINGS)


@lru_cache(maxsize=2**15)  # every check of a checkpoint asks for all of its names, and single experts are 11,520
def _lookup(name: str, layout: Layout, _forms: tuple[Spelling, ...]) -> MoEName | None:
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None
    prefix, layer, rest = match["prefix"], int(match["layer"]), match["rest"]
    for spelled in (layout,) if layout is Layout.NEMO else Layout:  # some adapters are saved under native names
        if (adapted := lora_rule(rest, spelled)) is not None:
            return MoEName(prefix, layer, adapted)
    if layout is Layout.NEMO:
        rule = _NEMO_ROWS.get(rest)
        return None if rule is None else MoEName(prefix, layer, rule)
    if (found := spellings.find(rest)) is None:
        return None
    spelling, rule, part = found
    return MoEName(prefix, layer, rule, spelling, part)


def layer_of(name: str) -> LayerKey | None:
    """Return the key of the layer that `name` belongs to, or None for a name outside all layers."""
    match = _IN_LAYER.fullmatch(name)
    return (match["prefix"], int(match["layer"])) if match else None


def _known(layout: Layout) -> Iterable[str]:
    """Return every REST of a layout; "{}" stands for an expert's number."""
    return _NEMO_ROWS if layout is Layout.NEMO else spellings.known_names()


def parse(name: str, layout: Layout) -> MoEName | None:
    """Explain `name` as a name of `layout`.

    Returns:
        The row and its layer, or None if the name is the same in both layouts.

    Raises:
        UnknownTensorError: The name is in a module of the experts or the router but not in the table; or it is a name
            of the table outside a layer.
    """
    found = lookup(name, layout)
    if found is not None:
        return found
    match = _IN_LAYER.fullmatch(name)
    rest = match["rest"] if match else name
    if match and rest in NATIVE_EXPERT_LORA:
        return None
    if match and rest.split(".")[0] in MOE_MODULES:
        raise _unknown(name, rest, layout)
    for known in _known(layout):
        if f".{rest}".endswith(f".{known}"):
            problem = f"a name of the {layout} layout outside a layer"
            hint = "give the tensor its full name, with the layer's number"
            expected = f"<prefix>layers.<number>.{known}"
            raise UnknownTensorError(problem, tensor=name, expected=expected, found=name, hint=hint)
    return None


_HINTS = {
    Layout.HF: "start from a published Gemma 4 checkpoint",
    Layout.NEMO: "exclude it, by exclude_key_regex of to_hf, if it isn't part of the model",
}


def _unknown(name: str, rest: str, layout: Layout) -> UnknownTensorError:
    """Return the error for a name in a module of the experts or the router that `layout` does not have."""
    problem = f"a tensor in the experts or the router that the {layout} layout does not have"
    hint = _HINTS[layout]
    if lookup(name, layout.other) is not None:
        problem = f"a name of the {layout.other} layout where the {layout} layout is read"
        hint = f"convert in the other direction, or give a state dict in the {layout} layout"
    elif (foreign := foreign_spelling(name)) is not None:
        rest, hint = f"{rest} ({foreign.name})", foreign.hint
        if is_lora(name):
            problem = "LoRA on experts in another form than NeMo's, which is not converted in memory"
            hint = "convert the adapter's directory: gemma4-moe lora ADAPTER DST --to nemo --base BASE"
    expected = f"one of {', '.join(rule.name(layout) for rule in RULES if rule.axes(layout))}"
    return UnknownTensorError(problem, tensor=name, expected=expected, found=rest, hint=hint)


_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


def fold_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return names folded over their numbers, in the order of their first, each with the names that it stands for."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("{}", name), []).append(name)
    return {_name(members): tuple(members) for members in groups.values()}


def _name(members: list[str]) -> str:
    """Return one name for names that differ in their numbers alone."""
    columns = zip(*(map(int, _NUMBER.findall(member)) for member in members), strict=True)
    shown = (_numbers(sorted(set(column))) for column in columns)
    return _NUMBER.sub(lambda _: next(shown), members[0])


def _numbers(values: list[int]) -> str:
    """Return "5" for one value, "{0...29}" for a run, "{0...4,6...10}" for several."""
    if len(values) == 1:
        return str(values[0])
    runs = []
    for _, numbered in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0]):
        run = [value for _, value in numbered]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}...{run[-1]}")
    return "{" + ",".join(runs) + "}"


def natural_key(name: str) -> tuple[str | int, ...]:
    """Return a key for natural order: layers.2 before layers.10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name))
