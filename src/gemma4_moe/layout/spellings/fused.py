"""Experts in one three-dimensional tensor a role, under the names of today and under the names of the first files."""

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
