"""One two-dimensional tensor an expert, with gate [I, H] and up [I, H] apart: the form that some engines load."""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP


def _names(module: str, ending: str, *, writable: bool = False) -> Spelling:
    gate, up, down = (f"{module}.{{}}.{projection}{ending}" for projection in ("gate_proj", "up_proj", "down_proj"))
    return Spelling("per-expert", {GATE_UP: (gate, up), DOWN: (down,)}, writable=writable)


PER_EXPERT = _names("experts", ".weight", writable=True)

#: Other names of the same form, which are read alone.
PER_EXPERT_ALSO = (_names("moe.experts", ".weight"), _names("experts", ""), _names("moe.experts", ""))
