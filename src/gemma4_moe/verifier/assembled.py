"""The tensors of a checkpoint one a role: those that a spelling stores in several tensors are read as one.

The verifier's own way to put them together: it asks a name for its expert and its run of rows, and nothing of the
planner.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeAlias

from gemma4_moe.checkpoint.quantised.file import weight_of
from gemma4_moe.errors import IncompleteExpertsError
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.verifier.dequantised import Dequantised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.names import MoEName
    from gemma4_moe.layout.table import Layout

    #: A tensor as it is stored, or dequantised.
    Stored: TypeAlias = StoredTensor | Dequantised


class Values(Protocol):
    """A tensor whose bytes can be read."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> DType:
        """Its dtype."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    def read_into(self, destination: memoryview, offset: int = 0) -> None:
        """Fill `destination` with its bytes from `offset` on."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """The tensor [E, R, C] of a role that is stored in several.

    Attributes:
        name: Its name in current spelling.
        slots: How many tensors hold the rows of one expert.
        tensors: The stored tensors by (expert, slot), or by (0, slot) if each holds all experts.
    """

    name: str
    shape: tuple[int, ...]
    slots: int
    tensors: Mapping[tuple[int, int], Stored]

    @property
    def dtype(self) -> DType:
        """The dtype of all its tensors."""
        return next(iter(self.tensors.values())).dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read_into(self, destination: memoryview, offset: int = 0) -> None:
        """Fill `destination` with its bytes from `offset` on. Raises what the files raise."""
        run = self.nbytes // self.shape[0] // self.slots
        rest = destination.cast("B")
        while rest.nbytes:
            number, before = divmod(offset, run)
            stored, begin, _ = self.at(*divmod(number, self.slots))
            count = min(rest.nbytes, run - before)
            stored.read_into(rest[:count], begin + before)
            rest, offset = rest[count:], offset + count

    def at(self, expert: int, slot: int) -> tuple[Stored, int, slice]:
        """Return the tensor with a run of an expert's rows, the run's first byte in it, and which rows they are."""
        rows = self.shape[1] // self.slots
        where = slice(slot * rows, (slot + 1) * rows)
        if (expert, slot) in self.tensors and len(self.tensors) > self.slots:
            return self.tensors[expert, slot], 0, where
        stored = self.tensors[0, slot]
        return stored, expert * stored.nbytes // self.shape[0], where


def rows_of(source: Values, expert: int) -> Iterator[tuple[str, slice]]:
    """Yield the name of each stored tensor with rows of an expert, and which rows it has."""
    if not isinstance(source, Assembled):
        yield source.name, slice(None)
        return
    for slot in range(source.slots):
        stored, _, rows = source.at(expert, slot)
        yield stored.name, rows


def assembled(
    tensors: Mapping[str, StoredTensor], names: Mapping[str, MoEName | None], layout: Layout
) -> dict[str, tuple[MoEName | None, Values]]:
    """Return the meaning and the values of each tensor, or of each role that is stored in several.

    `names` has the meaning of each name.

    Raises:
        IncompleteExpertsError: A role lacks a tensor, or its tensors differ in shape, dtype or spelling.
    """
    found: dict[str, tuple[MoEName | None, Values]] = {}
    roles: dict[str, list[tuple[MoEName, Stored]]] = {}
    for own, name in names.items():
        weight = weight_of(tensors[own])
        stored = tensors[own] if weight is None else Dequantised(weight)
        if name is None or name.part == WHOLE:
            found[own] = name, stored
        else:
            roles.setdefault(name.name(layout), []).append((name, stored))
    for role, members in roles.items():
        name, stored = members[0]
        slots = name.part.slots
        by_part = {(each.part.expert or 0, each.part.slot): tensor for each, tensor in members}
        experts = len(members) // slots if name.part.expert is not None else stored.shape[0]
        numbers = range(experts) if name.part.expert is not None else (0,)
        kinds = {(each.spelling, tensor.shape, tensor.dtype) for each, tensor in members}
        if len(kinds) != 1 or {(number, slot) for number in numbers for slot in range(slots)} != by_part.keys():
            raise IncompleteExpertsError(
                "Incomplete expert weights: tensors that don't make up one",
                tensor=stored.name,
                file=stored.file.path,
                expected=f"{slots} for each expert, alike in shape and dtype",
                found=f"{len(members)}, of {len(kinds)} kinds",
                hint="get the checkpoint again; gemma4-moe inspect names what is missing",
            )
        *_, rows, columns = stored.shape
        found[role] = name, Assembled(role, (experts, rows * slots, columns), slots, by_part)
    return found
