"""The published forms of the hf layout. A new form is a file here and a row of `SPELLINGS`.

Everything after this package knows roles, experts and rows alone. A form may be published under several sets of names;
these are rows of one name.
"""

from __future__ import annotations

from functools import cache

from gemma4_moe.layout.spellings.base import NUMBER, WHOLE, Part, Spelling
from gemma4_moe.layout.spellings.fused import CURRENT, LEGACY, WITH_WEIGHT
from gemma4_moe.layout.spellings.mlx import MLX
from gemma4_moe.layout.spellings.per_expert import PER_EXPERT, PER_EXPERT_ALSO
from gemma4_moe.layout.spellings.unfused import UNFUSED, UNFUSED_WITH_WEIGHT
from gemma4_moe.layout.spellings.vllm import VLLM
from gemma4_moe.layout.table import RULES, Rule

__all__ = ["CURRENT", "LEGACY_NAMES", "SPELLINGS", "WHOLE", "Part", "Spelling", "find", "known_names"]

#: Every form. A name that several forms share belongs to the first of them.
SPELLINGS = (
    CURRENT,
    LEGACY,
    WITH_WEIGHT,
    UNFUSED,
    UNFUSED_WITH_WEIGHT,
    PER_EXPERT,
    *PER_EXPERT_ALSO,
    *VLLM,
    MLX,
)

#: Each row that the first published files name otherwise, and its REST there.
LEGACY_NAMES = tuple((rule, names[0]) for rule, names in LEGACY.names.items())

Known = dict[str, tuple[Spelling, Rule, int, int]]


def find(rest: str) -> tuple[Spelling, Rule, Part] | None:
    """Return the form that has a tensor REST, its role and its share; None if there is none."""
    known = _known(SPELLINGS)
    if (whole := known.get(rest)) is not None:
        spelling, rule, slot, slots = whole
        return None if "{}" in rest else (spelling, rule, Part(None, slot, slots))
    for number in NUMBER.finditer(rest):  # a checkpoint of single experts has 11,520 such names: no search by form
        numbered = known.get(f"{rest[: number.start()]}{{}}{rest[number.end() :]}")
        if numbered is not None:
            spelling, rule, slot, slots = numbered
            return spelling, rule, Part(int(number[0]), slot, slots)
    return None


def known_names() -> dict[str, None]:
    """Return REST of every tensor of the forms in their order; "{}" stands for an expert's number."""
    return dict.fromkeys(_known(SPELLINGS))


@cache
def _known(forms: tuple[Spelling, ...]) -> Known:
    """Return the form, the role, the slot and the number of slots of each REST of these forms."""
    known: Known = {}
    for form in forms:
        for rule in RULES:
            templates = form.templates(rule)
            for slot, template in enumerate(templates):
                known.setdefault(template, (form, rule, slot, len(templates)))
    return known
