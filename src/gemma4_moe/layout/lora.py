"""Names of the parameters that LoRA adds to a model's modules."""

from __future__ import annotations

import re

#: Matches (`re.match`) the name of a parameter that LoRA adds; another string after `lora_` names its part.
LORA_REGEX = r".*\blora_"

#: Matches the whole name of a tensor of LoRA, or of a base weight under the name that PEFT's wrapper gives it.
LORA_NAME = r".*(\blora_[A-Za-z_]+|\.base_layer)(\.[A-Za-z0-9_]+)*"

_LORA = re.compile(LORA_NAME, re.DOTALL)


def is_lora(name: str) -> bool:
    """Return whether a tensor belongs to LoRA, or is a base weight under the name that PEFT's wrapper gives it."""
    return _LORA.fullmatch(name) is not None
