"""All experts of a projection in one three-dimensional tensor, gate [E, I, H] and up [E, I, H] apart."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP

UNFUSED = Spelling("unfused", {GATE_UP: ("experts.gate_proj", "experts.up_proj"), DOWN: (DOWN.hf,)}, writable=False)

UNFUSED_WITH_WEIGHT = Spelling(
    "unfused",
    {GATE_UP: ("experts.gate_proj.weight", "experts.up_proj.weight"), DOWN: (f"{DOWN.hf}.weight",)},
    writable=False,
)
