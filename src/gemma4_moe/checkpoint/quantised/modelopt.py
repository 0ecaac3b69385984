"""NVIDIA ModelOpt's FP8 and NVFP4, as it exports models for the Hub.

FP8 has one scale a tensor, or one a row. NVFP4's second scale multiplies: it is the reciprocal of compressed-tensors'
global scale. Its table of numbers has no −0.

The product is taken in fp32, and the value is bfloat16. ModelOpt's own function leaves the dtype open; if it is asked
for bfloat16, it rounds the scale to it first.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from gemma4_moe.checkpoint.quantised.form import Form
from gemma4_moe.checkpoint.quantised.weights import Numbers

LIBRARY = "modelopt"

_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale")


def leaves(pattern: str, module: str) -> bool:
    """Return whether an entry of `ignore` or `exclude_modules`, with "*", matches a module or one that it is in."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


FP8 = Form(
    "ModelOpt FP8",
    LIBRARY,
    Numbers.E4M3,
    scale="weight_scale",
    fused="_weight_scale",
    leaves=leaves,
    beside=_ACTIVATIONS,
)

NVFP4 = Form(
    "ModelOpt NVFP4",
    LIBRARY,
    Numbers.E2M1_UNSIGNED_ZERO,
    scale="weight_scale",
    fused="_weight_scale",
    second="weight_scale_2",
    fused_second="_weight_scale_2",
    leaves=leaves,
    beside=_ACTIVATIONS,
)

FORMS = (FP8, NVFP4)
