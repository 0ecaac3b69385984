"""The two layouts of a Gemma 4 mixture-of-experts layer: one row for each tensor, and the grammar of their names.

`hf` is the layout that transformers (5.5 and later) publishes, `nemo` the grouped-expert layout that NVIDIA NeMo
AutoModel trains. Axis letters: E experts, H hidden size, I inner size of an expert; the 2I rows are the gate's, then
the up projection's. A name is `P layers.L.REST`. P is any prefix (`model.language_model.`, `model.`, nothing, ...) and
is kept as it is, L is the layer's number, REST is looked up in `RULES`. A tensor outside the modules of the experts and
the router has the same name and bytes in both layouts.

Only the names of other published forms of the hf layout are elsewhere: in `spellings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Layout(StrEnum):
    """The two layouts, by the names that they have everywhere in this package."""

    HF = "hf"
    NEMO = "nemo"

    @property
    def other(self) -> Layout:
        """The layout that a conversion from this one leads to."""
        return Layout.NEMO if self is Layout.HF else Layout.HF


class Operation(StrEnum):
    """The operations between the layouts; `converted_shape` and `converted_axis` are their effect on shapes."""

    KEEP = "keep"
    TRANSPOSE = "transpose"
    TRANSPOSE_SCALE = "transpose, × per_expert_scale"
    FOLD = "folded into down_projs; ones on the way back"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        role: A short name for messages and lookups.
        hf: REST in the hf layout.
        nemo: REST in the nemo layout. A folded tensor has that of the tensor that it is multiplied into.
        nemo_axes: Axes in the nemo layout; empty for a tensor that is folded away.
        operation: The operation from hf to nemo.
    """

    role: str
    hf: str
    nemo: str
    hf_axes: tuple[str, ...]
    nemo_axes: tuple[str, ...]
    operation: Operation

    @property
    def in_nemo(self) -> bool:
        """Whether the nemo layout has a tensor of its own for this row."""
        return self.operation is not Operation.FOLD

    def name(self, layout: Layout) -> str:
        """Return REST in `layout`, current spelling."""
        return self.hf if layout is Layout.HF else self.nemo

    def axes(self, layout: Layout) -> tuple[str, ...]:
        """Return the axes of this row's tensor in `layout`."""
        return self.hf_axes if layout is Layout.HF else self.nemo_axes

    @property
    def is_matrices(self) -> bool:
        """Whether it holds a matrix an expert: [E, R, C]."""
        return len(self.hf_axes) == 3

    def yields(self, target: Layout) -> tuple[Rule, ...]:
        """Return the rules of the tensors that this rule's tensor becomes in layout `target`, this rule first.

        A tensor that took in another on the way to nemo gives it back on the way to hf.
        """
        if target is Layout.NEMO:
            return (self,) if self.in_nemo else ()
        return (self, *(rule for rule in RULES if rule.nemo == self.nemo and rule != self))

    @property
    def factor(self) -> Rule | None:
        """The row [E] that multiplies this row's experts on the way to nemo, or None."""
        folded = (rule for rule in RULES if rule.nemo == self.nemo and rule.operation is Operation.FOLD)
        return next(folded, None) if self.operation is Operation.TRANSPOSE_SCALE else None


# fmt: off
GATE_UP       = Rule("gate_up",       "experts.gate_up_proj",    "moe.experts.gate_and_up_projs", ("E", "2I", "H"), ("E", "H", "2I"), Operation.TRANSPOSE)
DOWN          = Rule("down",          "experts.down_proj",       "moe.experts.down_projs",        ("E", "H", "I"),  ("E", "I", "H"),  Operation.TRANSPOSE_SCALE)
SCALE         = Rule("scale",         "router.per_expert_scale", "moe.experts.down_projs",        ("E",),           (),               Operation.FOLD)
ROUTER_WEIGHT = Rule("router weight", "router.proj.weight",      "moe.gate.proj.weight",          ("E", "H"),       ("E", "H"),       Operation.KEEP)
ROUTER_SCALE  = Rule("router scale",  "router.scale",            "moe.gate.scale",                ("H",),           ("H",),           Operation.KEEP)
# fmt: on

#: The router's projection, a linear module that training may adapt: the parameters of its adapter move with it.
ROUTER_MODULE = {layout: ROUTER_WEIGHT.name(layout).removesuffix("weight") for layout in Layout}

RULES = (GATE_UP, DOWN, SCALE, ROUTER_WEIGHT, ROUTER_SCALE)

#: The rows without which a layer's experts can't be computed in each layout.
EXPERT_RULES = {Layout.HF: (GATE_UP, DOWN, SCALE), Layout.NEMO: (GATE_UP, DOWN)}

#: The rows that every layer of a checkpoint must have in each layout.
CHECKPOINT_RULES = {layout: tuple(rule for rule in RULES if rule.axes(layout)) for layout in Layout}

#: Modules of a layer that hold nothing but rows of the table, whichever layout's name they carry.
MOE_MODULES = frozenset(rest.split(".")[0] for rule in RULES for rest in (rule.hf, rule.nemo))

#: The fields with the size of each axis: of a text config, and of NeMo's MoE config.
SIZE_FIELDS = {
    "E": ("num_experts", "n_routed_experts"),
    "H": ("hidden_size", "dim"),
    "I": ("moe_intermediate_size", "moe_inter_dim"),
}


def lora_rule(rest: str, layout: Layout) -> Rule | None:
    """Return the row of a LoRA parameter of the router's projection by its REST, or None for another tensor."""
    parameter = rest.removeprefix(ROUTER_MODULE[layout])
    if parameter == rest or not parameter.startswith("lora_"):
        return None
    hf, nemo = (ROUTER_MODULE[each] + parameter for each in Layout)
    return Rule("router LoRA", hf, nemo, (), (), Operation.KEEP)


def transposes(operation: Operation) -> bool:
    """Return whether `operation` exchanges the last two axes; it is then its own inverse as far as shapes go."""
    return operation in (Operation.TRANSPOSE, Operation.TRANSPOSE_SCALE)


def converted_shape(operation: Operation, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on the other side of `operation`: [..., R, C] becomes [..., C, R] if it exchanges axes."""
    if not transposes(operation):
        return shape
    *leading, rows, columns = shape
    return (*leading, columns, rows)


def converted_axis(operation: Operation, axis: int, ndim: int) -> int:
    """Return the axis that `axis` of an `ndim`-dimensional tensor becomes on the other side of `operation`.

    A placement `Shard(axis)` becomes `Shard(converted_axis(...))`: no data crosses ranks.
    """
    if not transposes(operation) or axis < ndim - 2:
        return axis
    return 2 * ndim - 3 - axis


def shape_of(rule: Rule, layout: Layout, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of `rule`'s tensor in `layout` for given sizes of the axes E, H and I."""
    return tuple(sizes["I"] * 2 if axis == "2I" else sizes[axis] for axis in rule.axes(layout))
