"""All experts of a projection in one tensor of MLX's module of them, gate and up apart. MLX transposes nothing."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP

MLX = Spelling(
    "MLX",
    {
        GATE_UP: ("experts.switch_glu.gate_proj.weight", "experts.switch_glu.up_proj.weight"),
        DOWN: ("experts.switch_glu.down_proj.weight",),
    },
    writable=False,
)
