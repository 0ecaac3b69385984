"""LoRA adapters in three forms: one row for each tensor of the experts' adapter, and names of all LoRA parameters.

`nemo` is NVIDIA NeMo AutoModel's own form, trained beside folded weights. `peft` is a directory of PEFT with
`target_parameters`, `vllm` one pair of matrices an expert and projection: both belong to unfolded weights. Letters: r
rank; E, H and I as in the table of the layouts. Every form is a rearrangement of one plain tensor: A [E, r, in] and
B [E, out, r], so that an expert's change is scaling · B[e] · A[e], in the orientation of the hf layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gemma4_moe.layout.table import DOWN, GATE_UP, Rule

#: Matches (`re.match`) the name of a parameter that LoRA adds; another string after `lora_` names its part.
LORA_REGEX = r".*\blora_"

#: Matches the whole name of a tensor of LoRA, or of a base weight under the name that PEFT's wrapper gives it.
LORA_NAME = r".*(\blora_[A-Za-z_]+|\.base_layer)(\.[A-Za-z0-9_]+)*"

_LORA = re.compile(LORA_NAME, re.DOTALL)


def is_lora(name: str) -> bool:
    """Return whether a tensor belongs to LoRA, or is a base weight under the name that PEFT's wrapper gives it."""
    return _LORA.fullmatch(name) is not None


class LoraForm(StrEnum):
    """The forms of an adapter, by the names that they have everywhere in this package."""

    NEMO = "nemo"
    PEFT = "peft"
    VLLM = "vllm"

    @property
    def is_folded(self) -> bool:
        """Whether its base has each expert's scale multiplied into `down`."""
        return self is LoraForm.NEMO


class ParamWrapper(StrEnum):
    """PEFT's two layouts of an adapter of 3-D experts, by the stamps that NeMo AutoModel writes.

    Before 0.19.1 PEFT took a tensor [E, out, in] for [E, in, out]: the roles of A and B were exchanged.
    """

    CURRENT = "peft-0.19.1"
    LEGACY = "peft-0.18"


#: The axes of a stored tensor: each one or more axes of the plain tensor, the outermost first.
Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class LoraRow:
    """One row of the table: A or B of one expert weight.

    Attributes:
        rule: The row of the weight that it changes.
        side: "A" or "B".
        axes: The plain tensor's axes.
        nemo: REST in NeMo's form.
        legacy_side: The letter of its tensor in PEFT's layout before 0.19.1.
        projections: The modules of an expert that have it in vLLM's form, in the order of its rows.
    """

    rule: Rule
    side: str
    axes: tuple[str, str, str]
    nemo: str
    nemo_axes: Axes
    peft_axes: Axes
    legacy_side: str
    legacy_axes: Axes
    projections: tuple[str, ...]

    @property
    def takes_scale(self) -> bool:
        """Whether it differs between a folded and an unfolded base: by the expert's scale."""
        return self.side == "B" and self.rule.factor is not None

    def peft(self, layout: ParamWrapper, *, is_inner: bool) -> str:
        """Return REST in PEFT's form. Of two weights that are adapted, the wrapper of `down` is around the other's."""
        side = self.side if layout is ParamWrapper.CURRENT else self.legacy_side
        return f"{EXPERTS}.{'base_layer.' if is_inner else ''}lora_{side}.weight"

    def axes_in_peft(self, layout: ParamWrapper) -> Axes:
        """Return its axes in PEFT's form."""
        return self.peft_axes if layout is ParamWrapper.CURRENT else self.legacy_axes

    def vllm(self, expert: int, projection: str) -> str:
        """Return REST of one expert's matrix, [r, in] or [out, r], in vLLM's form."""
        return f"{EXPERTS}.{expert}.{projection}.lora_{self.side}.weight"


#: The module that holds the experts in the hf layout, and in the nemo layout.
EXPERTS, NEMO_EXPERTS = (name.rpartition(".")[0] for name in (GATE_UP.hf, GATE_UP.nemo))

_E, _R = ("E",), ("r",)
_MAJOR, _MINOR = ("E", "r"), ("r", "E")
_GATE_UP = ("gate_proj", "up_proj")

# fmt: off
GATE_UP_A = LoraRow(GATE_UP, "A", ("E", "r", "H"),  f"{NEMO_EXPERTS}.lora_gate_and_up_A", (_E, ("H",), _R),  (_MAJOR, ("H",)), "B", (("H",), _MINOR),  _GATE_UP)
GATE_UP_B = LoraRow(GATE_UP, "B", ("E", "2I", "r"), f"{NEMO_EXPERTS}.lora_gate_and_up_B", (_E, _R, ("2I",)), (("2I",), _MINOR), "A", (_MAJOR, ("2I",)), _GATE_UP)
DOWN_A    = LoraRow(DOWN,    "A", ("E", "r", "I"),  f"{NEMO_EXPERTS}.lora_down_A",        (_E, ("I",), _R),  (_MAJOR, ("I",)), "B", (("I",), _MINOR),  ("down_proj",))
DOWN_B    = LoraRow(DOWN,    "B", ("E", "H", "r"),  f"{NEMO_EXPERTS}.lora_down_B",        (_E, _R, ("H",)),  (("H",), _MINOR), "A", (_MAJOR, ("H",)),  ("down_proj",))
# fmt: on

LORA_ROWS = (GATE_UP_A, GATE_UP_B, DOWN_A, DOWN_B)

#: REST of NeMo's LoRA parameters of experts: the same in state dicts of both layouts, where B belongs to folded weights.
NATIVE_EXPERT_LORA = frozenset(row.nemo for row in LORA_ROWS)

#: The parameter of a linear module's adapter, after the module's name and a dot: A [r, in] and B [out, r].
LINEAR = {side: f"lora_{side}.weight" for side in "AB"}

#: Before each name in the file of an adapter.
ADAPTER_PREFIX = "base_model.model."
