"""The state that a stream sends, read again on every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gemma4_moe.distributed.placements import local_of
from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.layout.wrappers import plain_state
from gemma4_moe.model_io.load import storage_key
from gemma4_moe.refit.items import TensorFacts

#: Tensors by name; a value that is no tensor is skipped.
Tensors = Mapping[str, Any]
#: The states that a stream accepts.
State = torch.nn.Module | Tensors | Iterable[Tensors]


class Contents(NamedTuple):
    """The tensors of one mapping of a state.

    Attributes:
        natives: The facts of each tensor, under its first name.
        aliases: For each other name of a tensor, the first one.
        left_out: Names of tensors that are not sent.
        names: All names of the mapping.
    """

    natives: list[TensorFacts]
    aliases: dict[str, str]
    left_out: list[str]
    names: tuple[str, ...]


def mappings_of(state: State) -> Iterator[Tensors]:
    """Yield the mappings of a state, in its order; names are without wrappers."""
    if isinstance(state, torch.nn.Module):
        yield plain_state(state.state_dict())
    elif isinstance(state, Mapping):
        yield plain_state(state)
    elif isinstance(state, Iterator) or not isinstance(state, Iterable):
        raise UsageError(
            "a state that can't be read, or only once",
            expected="a module, a mapping, or an iterable of mappings that can be read again, such as a list",
            found=type(state).__name__,
            hint="give the model first, then the adapter; in place of a generator, an object whose __iter__ is one",
        )
    else:
        for tensors in state:
            yield plain_state(tensors)


def contents_of(tensors: Tensors, mapping: int, left_out: Callable[[str], bool]) -> Contents:
    """Return the tensors of a mapping whose names are not left out."""
    excluded = dict.fromkeys(name for name in tensors if left_out(name))
    kept = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and name not in excluded}
    first: dict[object, str] = {}
    same = {name: first.setdefault(_identity(tensor) or name, name) for name, tensor in kept.items()}
    natives = [TensorFacts.of(kept[name], name, mapping) for name in same if same[name] == name]
    return Contents(natives, {name: same[name] for name in same if same[name] != name}, list(excluded), tuple(tensors))


class StatePass:
    """One pass over a state, whose tensors must still be as planned.

    Attributes:
        problem: The first difference in the state's first mapping, which is read at once; None if there is none.
    """

    def __init__(self, state: State, planned: list[Contents], left_out: Callable[[str], bool]) -> None:
        self._mappings = mappings_of(state)
        self._planned = planned
        self._left_out = left_out
        self._number = -1
        self._tensors: Tensors = {}
        self.problem: InputError | None = None
        try:
            self._next()
        except InputError as error:
            self.problem = error

    def tensor(self, planned: TensorFacts) -> torch.Tensor:
        """Return a tensor by its facts; each mapping is dropped at the next."""
        while self._number < planned.mapping:
            self._next()
        tensor: torch.Tensor = self._tensors[planned.name]
        return tensor

    def finish(self) -> None:
        """Check the mappings of which nothing was sent, and that the state has no further ones."""
        while self._number < len(self._planned) - 1:
            self._next()
        self._tensors = {}
        found = self._number + 1 + sum(1 for _ in self._mappings)
        if found > len(self._planned):
            raise _changed(None, f"{len(self._planned)} mappings", f"{found}")

    def _next(self) -> None:
        self._tensors = next(self._mappings, {})
        self._number += 1
        planned = self._planned[self._number]
        if not _is_as_planned(self._tensors, planned):
            _compare(contents_of(self._tensors, self._number, self._left_out), planned)


def _is_as_planned(tensors: Tensors, planned: Contents) -> bool:
    """Return whether a mapping is as planned, if a quick look can tell: `_compare` finds the difference.

    Every pass asks, before anything is sent.
    """
    if tuple(tensors) != planned.names:
        return False
    places: dict[str, int] = {}
    for facts in planned.natives:
        tensor = tensors[facts.name]
        if not isinstance(tensor, torch.Tensor) or not facts.fit(tensor):
            return False
        places[facts.name] = (tensor if facts.mesh is None else local_of(tensor)).data_ptr()
    apart = len(set(places.values())) == len(places)  # no two became one tensor, and none is empty
    return apart and all(_identity(tensors[a]) == _identity(tensors[name]) for a, name in planned.aliases.items())


def _compare(found: Contents, planned: Contents) -> None:
    """Check that a mapping has the tensors and the aliases that it had when the stream was planned."""
    now = {facts.name: facts for facts in found.natives}
    then = {facts.name: facts for facts in planned.natives}
    for name, facts in then.items():
        if now.get(name) != facts:
            alias = found.aliases.get(name)
            is_now = f"the same tensor as {alias}" if alias else _text(now[name]) if name in now else "absent"
            raise _changed(name, _text(facts), is_now)
    for name, facts in now.items():
        if name not in then:
            was = planned.aliases.get(name)
            raise _changed(name, f"the same tensor as {was}" if was else "no tensor of this name", _text(facts))
    if found.aliases != planned.aliases:
        name = next(name for name, _ in found.aliases.items() ^ planned.aliases.items())
        raise _changed(name, _alias(planned, name), _alias(found, name))


def _alias(contents: Contents, name: str) -> str:
    return f"the same tensor as {contents.aliases[name]}" if name in contents.aliases else "no tensor of this name"


def _changed(name: str | None, expected: str, found: str) -> InputError:
    problem, hint = "the state has changed since the stream was planned", "make a new WeightStream"
    return InputError(problem, tensor=name, expected=expected, found=found, hint=hint)


def _text(facts: TensorFacts) -> str:
    return f"torch.{facts.dtype.name} {list(facts.shape)} {facts.placements}".rstrip()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return a key that is equal for two names of one tensor; None if it is empty."""
    local = local_of(tensor)
    key = (*storage_key(tensor), local.untyped_storage()._cdata if local.is_meta else None)
    return key if local.numel() else None
