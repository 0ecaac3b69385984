"""The type of a spelling: the stored tensors that make up a tensor of the hf layout, and the share that each holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.layout.table import RULES, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Part:
    """The share of a role's hf tensor [E, R, C] that one stored tensor holds: experts, and a run of their rows.

    Attributes:
        expert: The one expert that it holds, without the axis E; None if it holds all experts.
        slot: Which of the equal runs of rows it holds.
        slots: How many equal runs of rows there are: 2 if gate and up are stored apart, else 1.
    """

    expert: int | None = None
    slot: int = 0
    slots: int = 1

    def axes(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the axes of the stored tensor, from the axes of the whole one."""
        own = axes if self.expert is None else axes[1:]
        return tuple("I" if axis == "2I" and self.slots == 2 else axis for axis in own)

    def experts(self, count: int) -> tuple[int, int]:
        """Return the range of experts (start, end) that it holds, of `count`."""
        return (0, count) if self.expert is None else (self.expert, self.expert + 1)

    def rows(self, count: int) -> tuple[int, int]:
        """Return the range of rows (start, end) that it holds, of `count`."""
        return self.slot * count // self.slots, (self.slot + 1) * count // self.slots

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the stored tensor, from the shape of the whole one."""
        if self == WHOLE:
            return whole
        experts, rows, columns = whole
        shape = experts, rows // self.slots, columns
        return shape if self.expert is None else shape[1:]


#: All of a tensor.
WHOLE = Part()

#: The number of an expert in a name.
NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])", re.ASCII)


@dataclass(frozen=True, eq=False)
class Spelling:
    """One published form of the hf layout: the names of the tensors that make up each role.

    Attributes:
        name: Its name in messages and results.
        names: For each role that the form names itself, the REST (see `layout.table`) of its stored tensors, in the
            order of their rows. A "{}" stands for the number of an expert, if each expert has tensors of its own. All
            other roles have the names of the table.
        writable: Whether a stream can be written in this form.
    """

    name: str
    names: Mapping[Rule, tuple[str, ...]]
    writable: bool = True

    def __post_init__(self) -> None:
        known: set[str] = set()
        for rule in RULES:
            templates = self.templates(rule)
            numbered = {"{}" in template for template in templates}
            halves = len(templates) == 2 and rule.hf_axes[1:2] == ("2I",)
            if len(numbered) != 1 or not (len(templates) == 1 or halves) or (True in numbered and not rule.is_matrices):
                raise AssertionError(f"{self.name} can't store {rule.role} as {', '.join(templates)}")
            for template in templates:
                if template in known:
                    raise AssertionError(f"two tensors of {self.name} are called {template}")
                known.add(template)

    def templates(self, rule: Rule) -> tuple[str, ...]:
        """Return REST of each run of a role's rows; "{}" stands for an expert's number."""
        return self.names.get(rule, (rule.hf,))

    def parts(self, rule: Rule, experts: int) -> Iterator[tuple[str, Part]]:
        """Yield REST and contents of every tensor of a role with this number of experts, by experts and rows."""
        templates = self.templates(rule)
        for expert in range(experts) if "{}" in templates[0] else (None,):
            for slot, template in enumerate(templates):
                yield template.format(expert), Part(expert, slot, len(templates))
