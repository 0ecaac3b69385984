"""The published forms of the hf layout. A new form is a file here and a row of `SPELLINGS`.

Everything after this package knows roles, experts and rows alone.
"""

from __future__ import annotations

from gemma4_moe.layout.spellings.base import WHOLE, Part, Spelling
from gemma4_moe.layout.spellings.fused import CURRENT, LEGACY
from gemma4_moe.layout.spellings.per_expert import PER_EXPERT
from gemma4_moe.layout.table import RULES, Rule

__all__ = ["CURRENT", "LEGACY_NAMES", "SPELLINGS", "WHOLE", "Part", "Spelling", "find", "known_names"]

#: Every form. A name that several forms share belongs to the first of them.
SPELLINGS = (CURRENT, LEGACY, PER_EXPERT)

#: Each row that the first published files name otherwise, and its REST there.
LEGACY_NAMES = tuple((rule, names[0]) for rule, names in LEGACY.names.items())


def find(rest: str) -> tuple[Spelling, Rule, Part] | None:
    """Return the readable form that has a tensor REST, its role and its share; None if there is none."""
    found = ((form, *known) for form in SPELLINGS if form.readable and (known := form.find(rest)))
    return next(found, None)


def known_names() -> dict[str, None]:
    """Return REST of every tensor of the readable forms in their order; "{}" stands for an expert's number."""
    readable = (form for form in SPELLINGS if form.readable)
    return dict.fromkeys(template for form in readable for rule in RULES for template in form.templates(rule))
