"""The native state that a stream sends, read again on every pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gemma4_moe.distributed.placements import local_of
from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.model_io.load import storage_key
from gemma4_moe.refit.items import TensorFacts

#: Tensors by name; a value that is no tensor, as a state dict may have, is skipped.
Tensors = Mapping[str, Any]
#: The states that a stream accepts.
State = torch.nn.Module | Tensors | Iterable[Tensors]


def check_readable_again(state: State) -> None:
    """Check that a state can be read on more than one pass.

    Raises:
        UsageError: The state is an iterator, which ends after one pass.
    """
    if isinstance(state, Iterator):
        raise UsageError(
            "a state that can be read only once",
            expected="a module, a mapping, or an iterable that can be read again, such as a list",
            found=type(state).__name__,
            hint="give an object whose __iter__ is the generator, instead of the generator itself",
        )


def mappings_of(state: State) -> Iterator[Tensors]:
    """Yield the mappings of a state, in its order."""
    if isinstance(state, torch.nn.Module):
        yield state.state_dict()
    elif isinstance(state, Mapping):
        yield state
    else:
        yield from state


def sources_of(tensors: Tensors) -> tuple[dict[str, TensorFacts], dict[str, str]]:
    """Return each tensor's source, and for each alias of one its first name."""
    sources: dict[str, TensorFacts] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        same = first.setdefault(_identity(tensor), name) if local_of(tensor).numel() else name
        if same == name:
            sources[name] = TensorFacts.of(tensor)
        else:
            aliases[name] = same
    return sources, aliases


class StatePass:
    """One pass over a state, whose tensors must still be as planned.

    Args:
        state: The state.
        sources: The sources of each of its mappings, as planned.
    """

    def __init__(self, state: State, sources: Sequence[Mapping[str, TensorFacts]]) -> None:
        self._mappings = mappings_of(state)
        self._sources = sources
        self._number = -1
        self._tensors: Tensors = {}
        self._checked: dict[str, torch.Tensor] = {}

    def tensor(self, mapping: int, name: str) -> torch.Tensor:
        """Return a tensor of a mapping.

        Mappings must be asked for in order; each is dropped at the next.

        Raises:
            InputError: The tensor is missing, or has another shape, dtype, mesh or placement than planned.
        """
        while self._number < mapping:
            self._tensors, self._checked = next(self._mappings, {}), {}
            self._number += 1
        if name not in self._checked:
            self._checked[name] = _checked(self._tensors, name, self._sources[mapping][name])
        return self._checked[name]

    def finish(self) -> None:
        """Check that the state has no further mappings.

        Raises:
            InputError: The state has more mappings than planned.
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


def _checked(tensors: Tensors, name: str, source: TensorFacts) -> torch.Tensor:
    tensor = tensors.get(name)
    found = TensorFacts.of(tensor) if isinstance(tensor, torch.Tensor) else None
    if found != source:
        raise InputError(
            "a tensor that has changed since the stream was planned",
            tensor=name,
            expected=_text(source),
            found="absent" if found is None else _text(found),
            hint="make a new WeightStream after the model has changed",
        )
    assert isinstance(tensor, torch.Tensor), "a source is of a tensor"
    return tensor


def _text(source: TensorFacts) -> str:
    return f"{source.dtype} {list(source.shape)} {source.placements}".rstrip()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two names of one tensor, meta tensors included."""
    local = local_of(tensor)
    return (*storage_key(tensor), local.untyped_storage()._cdata if local.is_meta else None)
