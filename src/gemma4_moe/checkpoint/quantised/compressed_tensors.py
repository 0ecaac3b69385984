"""compressed-tensors' FP8 and NVFP4, as llm-compressor writes them.

Values are the library's own (`quantization.lifecycle.forward`, 0.20). FP8: number × scale in the dtype of the scale,
which is the fp32 product rounded once, because both factors are exact in fp32. NVFP4: number × (scale ÷ global scale)
in fp32, then bfloat16; −0 stays −0.
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


_ACTIVATIONS = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")

FP8 = Form(
    "compressed-tensors FP8",
    LIBRARY,
    Numbers.E4M3,
    scale="weight_scale",
    leaves=leaves,
    beside=_ACTIVATIONS,
    own_dtype=True,
    in_blocks=True,
)

NVFP4 = Form(
    "compressed-tensors NVFP4",
    LIBRARY,
    Numbers.E2M1,
    weight="weight_packed",
    scale="weight_scale",
    second="weight_global_scale",
    divides=True,
    leaves=leaves,
    beside=("input_global_scale", *_ACTIVATIONS),
)

FORMS = (FP8, NVFP4)
