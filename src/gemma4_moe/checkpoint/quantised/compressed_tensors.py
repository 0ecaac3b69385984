"""compressed-tensors' FP8, as llm-compressor writes it.

The value is the library's own (`quantization.lifecycle.forward`, 0.20): number × scale in the dtype of the scale, which
is the fp32 product rounded once, because both factors are exact in fp32.
"""

from __future__ import annotations

import re

from gemma4_moe.checkpoint.quantised.form import Form
from gemma4_moe.checkpoint.quantised.weights import Numbers

LIBRARY = "compressed-tensors"


def leaves(pattern: str, module: str) -> bool:
    """Return whether an entry of `ignore` matches a module: its name, or "re:" and a pattern for its start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


FP8 = Form(
    "compressed-tensors FP8",
    LIBRARY,
    Numbers.E4M3,
    scale="weight_scale",
    leaves=leaves,
    beside=("input_scale", "output_scale", "q_scale", "k_scale", "v_scale"),
    own_dtype=True,
    in_blocks=True,
)

FORMS = (FP8,)
