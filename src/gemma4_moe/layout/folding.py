"""Tensors folded over what repeats: `layers.{0...29}.experts.down_proj`, so that a model fits on a screen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gemma4_moe.checkpoint.directory import StoredTensor

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Fold:
    """Tensors whose names differ in numbers only.

    Attributes:
        name: Their name, each number as the set of its values.
        shape: Their shape.
        dtype: Their dtype's name.
        tensors: How many there are.
        bytes: Their size together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensors: int
    bytes: int


def fold(tensors: Iterable[StoredTensor]) -> tuple[Fold, ...]:
    """Fold tensors of one shape and dtype whose names differ in numbers only, in the order of their first."""
    groups: dict[tuple[str, tuple[int, ...], str], list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault((_pattern(tensor.name), tensor.shape, tensor.dtype.name), []).append(tensor)
    return tuple(
        Fold(
            name=_name(pattern, [member.name for member in members]),
            shape=shape,
            dtype=dtype,
            tensors=len(members),
            bytes=sum(member.nbytes for member in members),
        )
        for (pattern, shape, dtype), members in groups.items()
    )


def fold_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Fold names that differ in numbers only, in the order of their first; return each with the names it stands for."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    return {_name(pattern, members): tuple(members) for pattern, members in groups.items()}


def _pattern(name: str) -> str:
    return _NUMBER.sub("{}", name)


def _name(pattern: str, members: list[str]) -> str:
    numbers = [[int(number) for number in _NUMBER.findall(member)] for member in members]
    parts = pattern.split("{}")
    sets = [_numbers(sorted(set(column))) for column in zip(*numbers, strict=True)]
    return parts[0] + "".join(shown + part for shown, part in zip(sets, parts[1:], strict=True))


def _numbers(values: list[int]) -> str:
    """Return "5" for one value, "{0...29}" for a run, "{0...4,6...10}" for several."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    if len(values) == 1:
        return str(values[0])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}...{run[-1]}" for run in runs) + "}"
