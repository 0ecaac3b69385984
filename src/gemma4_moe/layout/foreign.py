"""Published forms of Gemma 4 MoE that are not converted: they are recognised by the names of tensors, and refused.

`checkpoint.foreign_formats` does the same by the names of files.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gemma4_moe.layout.lora import LORA_NAME


class ForeignSpelling(NamedTuple):
    """A published form of Gemma 4 MoE, or a relative of it, that this package names and does not convert.

    Attributes:
        reason: Why it is refused, and the next step.
        pattern: Matches a tensor name that only this form has.
    """

    name: str
    reason: str
    pattern: re.Pattern[str]


_DEQUANTISE = "quantised experts are not dequantised here: start from the unquantised checkpoint"

#: In order of precedence: the first form that any tensor shows names the checkpoint. Quantised forms have one tensor an
#: expert, too.
FOREIGN_SPELLINGS = tuple(
    ForeignSpelling(name, reason, re.compile(pattern, re.DOTALL))
    for name, reason, pattern in (
        ("compressed-tensors NVFP4", _DEQUANTISE, r".*\.(weight_packed|weight_global_scale|input_global_scale)"),
        ("ModelOpt NVFP4", _DEQUANTISE, r".*\.(weight_scale_2|input_scale)"),
        ("compressed-tensors FP8", _DEQUANTISE, r".*\.weight_scale"),
        ("MLX", "MLX has its own layout: start from the Hugging Face checkpoint", r".*\.switch_(glu|mlp)\..*"),
        (
            "DiffusionGemma",
            "a diffusion model shares these layers, but NeMo's Gemma 4 MoE model does not load it",
            r"model\.(decoder\.layers\.\d+\.(router|experts|moe)\..*|encoder\.language_model\..*)",
        ),
        (
            "per-expert",
            "one two-dimensional tensor an expert is not converted: start from the checkpoint with fused experts",
            r".*layers\.\d+\.(moe\.)?experts\.\d+\.(gate_proj|up_proj|down_proj)(\.weight)?",
        ),
        (
            "LoRA adapter",
            "merge the adapter into its base with PEFT first, then convert the merged model",
            LORA_NAME,
        ),
    )
)


def foreign_spelling(name: str) -> ForeignSpelling | None:
    """Return the foreign form that has a tensor of this name, or None if there is none."""
    return next((form for form in FOREIGN_SPELLINGS if form.pattern.fullmatch(name)), None)
