"""transformers' own FP8: a scale for each block of 128 rows and 128 columns.

The last block of rows or columns may be a part of one. transformers 5.18 reads such a weight with blocks of equal
sizes, or refuses it (`integrations.finegrained_fp8`), where its own writer made parts; the writer's rule is followed
here. The product is taken in fp32, and the value is bfloat16, the dtype of the model that it is loaded into.
"""

from __future__ import annotations

import re

from gemma4_moe.checkpoint.quantised.form import Form
from gemma4_moe.checkpoint.quantised.weights import Numbers

LIBRARY = "fp8"


def leaves(pattern: str, module: str) -> bool:
    """Return whether an entry of `modules_to_not_convert` matches a module: its start, as a pattern, or its end."""
    return re.match(pattern, module) is not None or module.endswith(pattern)


FP8 = Form(
    "FP8 in blocks",
    LIBRARY,
    Numbers.E4M3,
    scale="weight_scale_inv",
    fused="_scale_inv",
    leaves=leaves,
    beside=("activation_scale",),
    in_blocks=True,
)

FORMS = (FP8,)
