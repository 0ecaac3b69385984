"""The native state that a stream reads: a module, a mapping, or one mapping a layer, read anew on every pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gemma4_moe.distributed.placements import local_of
from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.model_io.load import storage_key
from gemma4_moe.refit.items import Source

#: Tensors by name; other values, such as a state dict may have, are no weights.
Tensors = Mapping[str, Any]
#: What a stream takes.
State = torch.nn.Module | Tensors | Iterable[Tensors]


def check_readable_again(state: State) -> None:
    """Check that every pass over a state can start anew.

    Raises:
        UsageError: It is an iterator, which ends after one pass.
    """
    if isinstance(state, Iterator):
        raise UsageError(
            "a state that can be read only once",
            expected="a module, a mapping, or an iterable that starts anew each time, such as a list",
            found=type(state).__name__,
            hint="give an object whose __iter__ is the generator, instead of the generator itself",
        )


def mappings_of(state: State) -> Iterator[Tensors]:
    """Yield the mappings of a state: one, or one after the other."""
    if isinstance(state, torch.nn.Module):
        yield state.state_dict()
    elif isinstance(state, Mapping):
        yield state
    else:
        yield from state


def describe(tensors: Tensors) -> tuple[dict[str, Source], dict[str, str]]:
    """Return what each tensor is, tied ones once, and for each alias the name that stands for it."""
    sources: dict[str, Source] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        same = first.setdefault(_identity(tensor), name) if local_of(tensor).numel() else name
        if same == name:
            sources[name] = Source.of(tensor)
        else:
            aliases[name] = same
    return sources, aliases


class Reader:
    """The values of one pass over a state, each of which must still be what it was when the stream was planned.

    Args:
        state: The state.
        sources: What each of its mappings had.
    """

    def __init__(self, state: State, sources: Sequence[Mapping[str, Source]]) -> None:
        self._mappings = mappings_of(state)
        self._sources = sources
        self._number = -1
        self._tensors: Tensors = {}
        self._checked: dict[str, torch.Tensor] = {}

    def tensor(self, mapping: int, name: str) -> torch.Tensor:
        """Return a tensor of a mapping; mappings are read in their order, and dropped once the next one is.

        Raises:
            InputError: It is gone, or another.
        """
        while self._number < mapping:
            self._tensors, self._checked = next(self._mappings, {}), {}
            self._number += 1
        if name not in self._checked:
            self._checked[name] = _checked(self._tensors, name, self._sources[mapping][name])
        return self._checked[name]

    def finish(self) -> None:
        """Check that nothing more has come to the state.

        Raises:
            InputError: There are more mappings than there were.
        """
        self._tensors, self._checked = {}, {}
        rest = len(self._sources) - 1 - self._number
        found = sum(1 for _ in self._mappings)
        if found > rest:
            raise InputError(
                "a state of more parts than it had when the stream was planned",
                expected=f"{len(self._sources)} mappings",
                found=f"{self._number + 1 + found}",
                hint="make a new WeightStream after the model has changed",
            )


def _checked(tensors: Tensors, name: str, source: Source) -> torch.Tensor:
    tensor = tensors.get(name)
    found = Source.of(tensor) if isinstance(tensor, torch.Tensor) else None
    if found != source:
        raise InputError(
            "a tensor that is no longer what it was when the stream was planned",
            tensor=name,
            expected=_text(source),
            found="absent" if found is None else _text(found),
            hint="make a new WeightStream after the model has changed",
        )
    assert isinstance(tensor, torch.Tensor), "it is what it was"
    return tensor


def _text(source: Source) -> str:
    return f"{source.dtype} {list(source.shape)} {source.placements}".rstrip()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common, on the meta device too, where no memory tells."""
    local = local_of(tensor)
    return (*storage_key(tensor), local.untyped_storage()._cdata if local.is_meta else None)
