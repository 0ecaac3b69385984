"""Names of a module's state dict without the parts that torch adds to them.

A wrapped module's state dict has the wrapper's attribute in its names: at the start if the whole model is wrapped, or
inside if a layer is. No tensor of Gemma 4 has a component of these names. An `_extra_state` belongs to a module's code
and to no checkpoint.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from gemma4_moe.errors import DuplicateTensorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")

#: The attribute that holds the wrapped module, by wrapper.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_fpw_module": "FullyShardedDataParallel of FairScale",
    "_forward_module": "Lightning Fabric",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def without_wrappers(name: str) -> str:
    """Return `name` without the components of wrappers."""
    return ".".join(component for component in name.split(".") if component not in WRAPPERS)


def wrappers_in(name: str) -> list[str]:
    """Return the components of wrappers in `name`, each once."""
    return list(dict.fromkeys(component for component in name.split(".") if component in WRAPPERS))


def unwrapped(names: Iterable[str], plain_of: Callable[[str], str] = without_wrappers) -> dict[str, str]:
    """Return the given name of each name that `plain_of` makes plain, in the order given.

    Raises:
        DuplicateTensorError: Two names become one.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = plain_of(name)
        if plain in found:
            raise DuplicateTensorError(
                "two names that become one without their wrappers",
                tensor=name,
                expected=f"one name for {plain}",
                found=f"also {found[plain]}",
                hint="give the state dict of one module; leave one of the two out",
            )
        found[plain] = name
    return found


def is_extra_state(name: str) -> bool:
    """Return whether an entry of a state dict is a module's own extra state."""
    return "_extra_state" in name


def plain_state(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict under names without wrappers, and without extra state. Errors are those of `unwrapped`."""
    return {plain: state[name] for plain, name in _plain_names(tuple(state))}


@lru_cache(maxsize=8)  # a stream asks for those of one state on every pass
def _plain_names(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return each name without wrappers, and as it was given; extra state is left out."""
    return tuple(unwrapped(name for name in names if not is_extra_state(name)).items())
