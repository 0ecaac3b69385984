"""One two-dimensional tensor an expert, with gate and up apart: the form that some engines load. It is only written."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP

PER_EXPERT = Spelling(
    "per-expert",
    {
        GATE_UP: ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
        DOWN: ("experts.{}.down_proj.weight",),
    },
    readable=False,
)
