"""The entries of a state dict as the adapter takes them in: explained, checked, and read when they are needed.

A value is a tensor, or lazy in the protocol of safetensors' slices: `get_shape`, `get_dtype` and `__getitem__`. What
has the same name in both layouts may also be no tensor at all, as the `_extra_state` of some modules is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe import destinations, dtypes
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layouts import EXPERT_RULES, MoEName, Operation, lookup

if TYPE_CHECKING:
    from gemma4_moe.interface import StateDict
    from gemma4_moe.inventory import Inventory, Owner

_EXPERT_DTYPES = tuple(dtype.name for dtype in dtypes.EXPERT_DTYPES)

#: One entry: what its name means (None where it is the same in both layouts), the name, the value.
Entry = tuple[MoEName | None, str, Any]


def explained(
    state_dict: StateDict, inventory: Inventory, dropped: Callable[[str], bool] = lambda _: False
) -> Iterator[Entry]:
    """Yield the entries of `state_dict` in its order, each checked against `inventory`.

    A mapping can be read twice, so all of it is checked before its first entry is given. Anything else is consumed
    one by one, and no value is held once the next is asked for.

    Args:
        state_dict: The entries.
        inventory: Where they are taken in; it knows the layout and the sizes.
        dropped: Says of a name that the layout does not know that it is left out, not refused.

    Raises:
        IncompleteExpertsError: A layer lacks one of its expert tensors.
        UsageError: A destination stands beside an ordinary tensor of its layer.
        UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
    """
    required = EXPERT_RULES[inventory.layout]
    if isinstance(state_dict, Mapping):
        entries = list(_explained_singly(state_dict.items(), inventory, dropped))
        inventory.require_complete(required)
        yield from entries
    else:
        yield from _explained_singly(state_dict, inventory, dropped)
        inventory.require_complete(required)


def explain(name: str, value: Any, inventory: Inventory) -> MoEName | None:
    """Return what `name` means, with the shape and dtype of `value` checked. Errors are those of `explained`."""
    parsed = inventory.add(name, _shape(value))
    if parsed is not None and parsed.rule.operation is not Operation.KEEP and _dtype(value) not in _EXPERT_DTYPES:
        raise TensorShapeError(
            "an expert tensor of a dtype that is not converted",
            tensor=name,
            expected=f"one of {', '.join(_EXPERT_DTYPES)}",
            found=_dtype(value),
            hint="start from the unquantised checkpoint",
        )
    return parsed


def tensor(value: Any) -> torch.Tensor:
    """Return a tensor for computing: a lazy value is read, a parameter leaves its graph."""
    read: torch.Tensor = value.detach() if isinstance(value, torch.Tensor) else value[...]
    return read


def kept(value: Any) -> Any:
    """Return what stands for `value` in the other layout: itself, or the whole tensor of a lazy value."""
    return value[...] if hasattr(value, "get_shape") else value


def _explained_singly(pairs: Any, inventory: Inventory, dropped: Callable[[str], bool]) -> Iterator[Entry]:
    marked: dict[Owner, bool] = {}
    for name, value in pairs:
        if lookup(name, inventory.layout) is None and dropped(name):
            continue
        parsed = explain(name, value, inventory)
        if parsed is not None and parsed.rule.operation is not Operation.KEEP:
            _refuse_mixture(parsed, name, value, marked)
        yield parsed, name, value
        del value  # or it would stay alive while the next one is made


def _refuse_mixture(parsed: MoEName, name: str, value: Any, marked: dict[Owner, bool]) -> None:
    is_destination = destinations.native_of(value) is not None
    if marked.setdefault(parsed.owner, is_destination) != is_destination:
        raise UsageError(
            "a destination beside an ordinary tensor of its layer",
            tensor=name,
            expected="all of the layer's expert tensors as `to_hf(for_checkpoint_load=True)` returned them",
            found="one of them replaced, or copied by clone, detach or contiguous",
            hint="hand back the destinations themselves, or give ordinary tensors for the whole layer",
        )


def _shape(value: Any) -> tuple[int, ...]:
    if hasattr(value, "get_shape"):
        return tuple(value.get_shape())
    return tuple(getattr(value, "shape", ()))


def _dtype(value: Any) -> str:
    if hasattr(value, "get_dtype"):
        return dtypes.BY_TAG[value.get_dtype()].name
    return str(value.dtype).removeprefix("torch.")
