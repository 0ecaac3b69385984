"""The native state that a stream sends, read again on every pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def mappings_of(state: State) -> Iterator[Tensors]:
    """Yield the mappings of a state, in its order."""
    if isinstance(state, torch.nn.Module):
        yield state.state_dict()
    elif isinstance(state, Mapping):
        yield state
    elif isinstance(state, Iterator):
        raise UsageError(
            "a state that can be read only once",
            expected="a module, a mapping, or an iterable that can be read again, such as a list",
            found=type(state).__name__,
            hint="give an object whose __iter__ is the generator, instead of the generator itself",
        )
    else:
        yield from state


def natives_of(tensors: Tensors, mapping: int) -> tuple[list[TensorFacts], dict[str, str]]:
    """Return the facts of each tensor of a mapping, and for each alias of one its first name."""
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    first: dict[object, str] = {}
    same = {name: first.setdefault(_identity(tensor) or name, name) for name, tensor in tensors.items()}
    natives = [TensorFacts.of(tensors[name], name, mapping) for name in same if same[name] == name]
    return natives, {name: same[name] for name in same if same[name] != name}


class StatePass:
    """One pass over a state, whose tensors must still be as planned."""

    def __init__(self, state: State, count: int) -> None:
        self._mappings = mappings_of(state)
        self._count = count
        self._number = -1
        self._tensors: Tensors = {}
        self._checked: dict[str, torch.Tensor] = {}

    def tensor(self, planned: TensorFacts) -> torch.Tensor:
        """Return a tensor by its facts; each mapping is dropped at the next."""
        name = planned.name
        while self._number < planned.mapping:
            self._tensors, self._checked = next(self._mappings, {}), {}
            self._number += 1
        if name not in self._checked:
            tensor = self._tensors.get(name)
            found = TensorFacts.of(tensor, name, planned.mapping) if isinstance(tensor, torch.Tensor) else None
            if tensor is None or found != planned:
                raise InputError(
                    "a tensor that has changed since the stream was planned",
                    tensor=name,
                    expected=_text(planned),
                    found="absent" if found is None else _text(found),
                    hint="make a new WeightStream after the model has changed",
                )
            self._checked[name] = tensor
        return self._checked[name]

    def finish(self) -> None:
        """Check that the state has no further mappings."""
        self._tensors, self._checked = {}, {}
        found = self._number + 1 + sum(1 for _ in self._mappings)
        if found > self._count:
            raise InputError(
                "a state of more parts than it had when the stream was planned",
                expected=f"{self._count} mappings",
                found=f"{found}",
                hint="make a new WeightStream after the model has changed",
            )


def _text(facts: TensorFacts) -> str:
    return f"torch.{facts.dtype.name} {list(facts.shape)} {facts.placements}".rstrip()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return a key that is equal for two names of one tensor; None if it is empty."""
    local = local_of(tensor)
    key = (*storage_key(tensor), local.untyped_storage()._cdata if local.is_meta else None)
    return key if local.numel() else None
