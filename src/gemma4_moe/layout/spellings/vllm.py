"""The fused experts under the names that they have as parameters of vLLM: w1 is gate, w3 is up, w2 is down."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP

#: The module that holds the parameters has moved from version to version.
_MODULES = ("experts", "experts.routed_experts", "moe.experts", "moe.experts.routed_experts")

VLLM = tuple(
    Spelling(
        "vLLM's fused names",
        {GATE_UP: (f"{module}.w13_weight",), DOWN: (f"{module}.w2_weight",)},
        writable=False,
    )
    for module in _MODULES
)
