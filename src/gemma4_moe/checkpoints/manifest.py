"""`gemma4_moe.json`: what a converted directory says of how it came to be.

It holds nothing that changes from run to run, no time and no path, so that equal conversions give equal bytes.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoints.files import SafetensorsFile
    from gemma4_moe.planning import Plan
    from gemma4_moe.scales import Scales

MANIFEST_NAME = "gemma4_moe.json"

#: Raised when a reader of the old form would misunderstand the new one.
FORMAT = 1


def build_manifest(
    plan: Plan,
    sources: Mapping[str, SafetensorsFile],
    scales: Scales,
    version: str,
) -> bytes:
    """Return the manifest of a conversion.

    Args:
        plan: What was done.
        sources: The source's safetensors files by name.
        scales: For each target tensor that a scale was folded into, the scale [E], fp32.
        version: The version of this package.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "gemma4_moe": version,
        "source": {
            "layout": plan.source_layout,
            "spelling": plan.spelling,
            "files": {
                name: {"bytes": file.size, "header_sha256": file.header.digest} for name, file in sources.items()
            },
        },
        "layout": plan.target_layout,
        "files": {file.name: {"bytes": file.size} for file in plan.files},
        "source_dtypes": {
            tensor.name: tensor.source.dtype.name for tensor in plan.tensors.values() if tensor.source is not None
        },
        "folded_scales": {name: [_number(value) for value in scale.tolist()] for name, scale in scales.items()},
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinities."""
    return value if math.isfinite(value) else str(value)
