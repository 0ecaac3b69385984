"""Experts in one three-dimensional tensor a role: the names of today, of the first files, and with a `.weight`."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP, SCALE

#: The names of the table: what transformers 5.5 and later publishes.
CURRENT = Spelling("current", {GATE_UP: (GATE_UP.hf,), DOWN: (DOWN.hf,)})

LEGACY = Spelling(
    "legacy",
    {GATE_UP: ("moe.gate_up_proj",), DOWN: ("moe.down_proj",), SCALE: ("moe.per_expert_scale",)},
    writable=False,
)

WITH_WEIGHT = Spelling(
    "fused with .weight", {GATE_UP: (f"{GATE_UP.hf}.weight",), DOWN: (f"{DOWN.hf}.weight",)}, writable=False
)
