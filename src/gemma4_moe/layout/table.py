"""The two layouts of a Gemma 4 mixture-of-experts layer: one row for each tensor, and the grammar of their names.

`hf` is the layout that transformers (5.5 and later) publishes, `nemo` the grouped-expert layout that NVIDIA NeMo
AutoModel trains. Axis letters: E experts, H hidden size, I inner size of an expert; the 2I rows are the gate's, then
the up projection's. A name is `P layers.L.REST`: P is whatever stands before (`model.language_model.`, `model.`,
nothing, ...) and is kept as it is, L is the layer's number, REST is looked up in `RULES`. What REST is not in the
table, and not in a module that belongs to the experts or the router, has the same name and bytes in both layouts.

This is the only place that knows these names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.layout.foreign import foreign_spelling


class Layout(StrEnum):
    """The two layouts, by the names that they have everywhere in this package."""

    HF = "hf"
    NEMO = "nemo"

    @property
    def other(self) -> Layout:
        """The layout that a conversion from this one leads to."""
        return Layout.NEMO if self is Layout.HF else Layout.HF


class Operation(StrEnum):
    """What happens to a tensor between the layouts; `transforms` says what each does to shapes and bits."""

    KEEP = "keep"
    TRANSPOSE = "transpose"
    TRANSPOSE_SCALE = "transpose, × per_expert_scale"
    FOLD = "folded into down_projs; ones on the way back"


class Spelling(StrEnum):
    """The two ways in which the hf layout has been published."""

    CURRENT = "current"
    LEGACY = "legacy"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        role: A short name for messages and lookups.
        hf: REST in the hf layout.
        nemo: REST in the nemo layout. For a tensor that is folded away, that of the tensor that takes it in.
        hf_axes: Axes in the hf layout.
        nemo_axes: Axes in the nemo layout; empty for a tensor that is folded away.
        operation: What happens from hf to nemo.
        legacy: REST in the hf layout's legacy spelling, if it differs.
    """

    role: str
    hf: str
    nemo: str
    hf_axes: tuple[str, ...]
    nemo_axes: tuple[str, ...]
    operation: Operation
    legacy: str | None = None

    @property
    def in_nemo(self) -> bool:
        """Whether the nemo layout has a tensor of its own for this row."""
        return bool(self.nemo_axes)

    def name(self, layout: Layout) -> str:
        """Return REST in `layout`, current spelling; for what is folded away, that of the tensor that takes it in."""
        return self.hf if layout is Layout.HF else self.nemo

    def axes(self, layout: Layout) -> tuple[str, ...]:
        """Return the axes of this row's tensor in `layout`."""
        return self.hf_axes if layout is Layout.HF else self.nemo_axes

    def names(self, layout: Layout) -> dict[str, Spelling]:
        """Return every REST that means this row in `layout`."""
        if layout is Layout.NEMO:
            return {self.nemo: Spelling.CURRENT} if self.in_nemo else {}
        return {self.hf: Spelling.CURRENT} | ({self.legacy: Spelling.LEGACY} if self.legacy else {})


# fmt: off
GATE_UP       = Rule("gate_up",       "experts.gate_up_proj",    "moe.experts.gate_and_up_projs", ("E", "2I", "H"), ("E", "H", "2I"), Operation.TRANSPOSE,       "moe.gate_up_proj")
DOWN          = Rule("down",          "experts.down_proj",       "moe.experts.down_projs",        ("E", "H", "I"),  ("E", "I", "H"),  Operation.TRANSPOSE_SCALE, "moe.down_proj")
SCALE         = Rule("scale",         "router.per_expert_scale", "moe.experts.down_projs",        ("E",),           (),               Operation.FOLD,            "moe.per_expert_scale")
ROUTER_WEIGHT = Rule("router weight", "router.proj.weight",      "moe.gate.proj.weight",          ("E", "H"),       ("E", "H"),       Operation.KEEP)
ROUTER_SCALE  = Rule("router scale",  "router.scale",            "moe.gate.scale",                ("H",),           ("H",),           Operation.KEEP)
# fmt: on

RULES = (GATE_UP, DOWN, SCALE, ROUTER_WEIGHT, ROUTER_SCALE)

#: The rows without which a layer's experts can't be computed in each layout.
EXPERT_RULES = {Layout.HF: (GATE_UP, DOWN, SCALE), Layout.NEMO: (GATE_UP, DOWN)}


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One expert's part of a row in the hf layout, as a tensor of its own with two axes: what some engines ask for.

    Attributes:
        hf: REST, with a place for the expert's number.
        hf_axes: Axes of the part.
        part: Which of the row's equal parts along its first inner axis this is.
    """

    hf: str
    hf_axes: tuple[str, str]
    part: int = 0


# fmt: off
#: The rows that can be written expert by expert, and what each expert's part of them is called.
EXPERT_ROWS = {
    GATE_UP: (ExpertRow("experts.{}.gate_proj.weight", ("I", "H"), 0), ExpertRow("experts.{}.up_proj.weight", ("I", "H"), 1)),
    DOWN:    (ExpertRow("experts.{}.down_proj.weight", ("H", "I")),),
}
# fmt: on

#: The rows that every layer of a checkpoint must have in each layout.
CHECKPOINT_RULES = {layout: tuple(rule for rule in RULES if rule.axes(layout)) for layout in Layout}

#: Modules of a layer that hold nothing but rows of the table, whichever layout's name they carry.
MOE_MODULES = frozenset(rest.split(".")[0] for rule in RULES for rest in (rule.hf, rule.nemo))


def _lookup(layout: Layout) -> dict[str, tuple[Rule, Spelling]]:
    table: dict[str, tuple[Rule, Spelling]] = {}
    for rule in RULES:
        for rest, spelling in rule.names(layout).items():
            if rest in table:
                raise AssertionError(f"two rows of the {layout} layout are spelled {rest}")
            table[rest] = (rule, spelling)
    return table


_LOOKUP = {layout: _lookup(layout) for layout in Layout}
_IN_LAYER = re.compile(r"(?P<prefix>(?:.+\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,8})\.(?P<rest>.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class MoEName:
    """A name that a row of the table explains.

    Attributes:
        prefix: Everything before `layers.`, its dot included.
        layer: The layer's number L.
        rule: The row.
        spelling: Which spelling the name has.
    """

    prefix: str
    layer: int
    rule: Rule
    spelling: Spelling = Spelling.CURRENT

    @property
    def owner(self) -> tuple[str, int]:
        """What tells this name's layer from all other layers: two towers may both have a layer 0."""
        return self.prefix, self.layer

    @property
    def layer_path(self) -> str:
        """The name of the layer, with its last dot."""
        return f"{self.prefix}layers.{self.layer}."

    @property
    def hf(self) -> str:
        """The whole name in the hf layout, current spelling."""
        return self.layer_path + self.rule.hf

    @property
    def nemo(self) -> str:
        """The whole name in the nemo layout; for the scale, that of the tensor that takes it in."""
        return self.layer_path + self.rule.nemo

    def name(self, layout: Layout) -> str:
        """Return the whole name in `layout`, current spelling."""
        return self.layer_path + self.rule.name(layout)

    def of_expert(self, row: ExpertRow, expert: int) -> str:
        """Return the whole hf name of one expert's part of this tensor."""
        return self.layer_path + row.hf.format(expert)

    def sibling(self, rule: Rule) -> MoEName:
        """Return the name of another row in the same layer, current spelling."""
        return MoEName(self.prefix, self.layer, rule)


def lookup(name: str, layout: Layout) -> MoEName | None:
    """Return the row that explains `name` in `layout` and where it stands, None where no row does."""
    match = _IN_LAYER.fullmatch(name)
    row = _LOOKUP[layout].get(match["rest"]) if match else None
    return MoEName(match["prefix"], int(match["layer"]), *row) if match and row else None


def layer_of(name: str) -> tuple[str, int] | None:
    """Return what stands before `layers.` in `name`, and the layer's number; None for a name outside all layers."""
    match = _IN_LAYER.fullmatch(name)
    return (match["prefix"], int(match["layer"])) if match else None


def parse(name: str, layout: Layout) -> MoEName | None:
    """Explain `name` as a name of `layout`.

    Returns:
        The row and where it stands, or None where the name is the same in both layouts.

    Raises:
        UnknownTensorError: The name stands in a module that belongs to the experts or the router and is not in the
            table, or carries a name of the table outside a layer.
    """
    found = lookup(name, layout)
    if found is not None:
        return found
    match = _IN_LAYER.fullmatch(name)
    rest = match["rest"] if match else name
    if match is not None and rest.split(".")[0] in MOE_MODULES:
        raise _unknown(name, rest, layout)
    for known in _LOOKUP[layout]:
        if rest == known or rest.endswith("." + known):
            raise UnknownTensorError(
                f"a name of the {layout} layout that stands outside a layer",
                tensor=name,
                expected=f"<prefix>layers.<number>.{known}",
                found=name,
                hint="give the tensor its full name, with the layer's number",
            )
    return None


def _unknown(name: str, rest: str, layout: Layout) -> UnknownTensorError:
    if rest in _LOOKUP[layout.other]:
        return UnknownTensorError(
            f"a name of the {layout.other} layout where the {layout} layout is read",
            tensor=name,
            expected=f"one of {', '.join(_LOOKUP[layout])}",
            found=rest,
            hint=f"convert in the other direction, or give a state dict in the {layout} layout",
        )
    foreign = foreign_spelling(name)
    return UnknownTensorError(
        f"a tensor in the experts or the router that the {layout} layout does not have",
        tensor=name,
        expected=f"one of {', '.join(_LOOKUP[layout])}",
        found=f"{rest} ({foreign.name})" if foreign else rest,
        hint=foreign.reason if foreign else "remove the tensor, or exclude it if it isn't part of the model",
    )
