"""The entries of a state dict as the adapter takes them in: explained, checked, and read when they are needed.

A value is a tensor, or lazy in the protocol of safetensors' slices: `get_shape`, `get_dtype` and `__getitem__`. What
has the same name in both layouts may also be no tensor at all, as the `_extra_state` of some modules is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations
from gemma4_moe.distributed.placements import placed_on, whole_shape
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import LayerKey, MoEName, lookup
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import EXPERT_RULES, Layout, Operation

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.interface import StateDict
    from gemma4_moe.layout.inventory import Inventory


class Entry(NamedTuple):
    """One entry of a state dict.

    Attributes:
        parsed: What its name means; None where it is the same in both layouts.
        name: Its name.
        value: Its value.
        shape: The whole tensor's shape, also where the value is only a rank's part of it.
    """

    parsed: MoEName | None
    name: str
    value: Any
    shape: tuple[int, ...]


def explained(
    state_dict: StateDict,
    inventory: Inventory,
    mesh: DeviceMesh | None = None,
    dropped: Callable[[str], bool] = lambda _: False,
) -> Iterator[Entry]:
    """Yield the entries of `state_dict` in its order, each checked against `inventory`.

    A mapping can be read twice, so all of it is checked before its first entry is given. Anything else is consumed
    one by one, and no value is held once the next is asked for.

    Args:
        state_dict: The entries.
        inventory: Where they are taken in; it knows the layout and the sizes.
        mesh: What plain values may be a rank's part on.
        dropped: Says of a name that the layout does not know that it is left out, not refused.

    Raises:
        IncompleteExpertsError: A layer lacks one of its expert tensors.
        UsageError: A destination stands beside an ordinary tensor of its layer.
        ParallelError: A plain tensor beside a mesh of which nothing tells whether it is whole.
        UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
    """
    required = EXPERT_RULES[inventory.layout]
    if isinstance(state_dict, Mapping):
        entries = list(_explained_singly(state_dict.items(), inventory, mesh, dropped))
        inventory.require_complete(required)
        yield from entries
    else:
        yield from _explained_singly(state_dict, inventory, mesh, dropped)
        inventory.require_complete(required)


def explain(name: str, value: Any, inventory: Inventory, mesh: DeviceMesh | None = None) -> Entry:
    """Return one entry with its name, shape and dtype checked. Errors are those of `explained`."""
    found = lookup(name, inventory.layout)
    if found is not None and not isinstance(value, torch.Tensor) and not hasattr(value, "get_shape"):
        raise TensorShapeError(
            "a value that is no tensor",
            tensor=name,
            expected="a torch tensor, or a lazy slice of safetensors",
            found=type(value).__name__,
            hint="give torch tensors",
        )
    shape = _shape(value)
    if found is not None and found.part == WHOLE and mesh is not None and not isinstance(value, DTensor):
        shape = _whole_shape(found, name, shape, inventory, mesh)
    parsed = inventory.add(name, shape, None if found is None else _dtype(value))
    return Entry(parsed, name, value, shape)


def kept(value: Any) -> Any:
    """Return what stands for `value` in the other layout: itself, or the whole tensor of a lazy value."""
    return value[...] if hasattr(value, "get_shape") else value


def _explained_singly(
    pairs: Any, inventory: Inventory, mesh: DeviceMesh | None, dropped: Callable[[str], bool]
) -> Iterator[Entry]:
    marked: dict[LayerKey, bool] = {}
    for name, value in pairs:
        if lookup(name, inventory.layout) is None and dropped(name):
            continue
        entry = explain(name, value, inventory, mesh)
        if entry.parsed is not None and entry.parsed.rule.operation is not Operation.KEEP:
            _refuse_mixture(entry.parsed, name, value, marked)
        yield entry
        del entry, value  # or it would stay alive while the next one is made


def _whole_shape(
    found: MoEName, name: str, shape: tuple[int, ...], inventory: Inventory, mesh: DeviceMesh
) -> tuple[int, ...]:
    """Return the shape of the expert tensor that a plain value beside a mesh is, or is a part of."""
    rule = found.rule
    if rule.operation is Operation.KEEP:
        return shape
    where = placed_on(mesh, name)
    if inventory.layout is Layout.HF:
        where = where.converted(rule.operation, len(rule.hf_axes)) if rule.in_nemo else where.of_experts()
    return whole_shape(shape, rule.axes(inventory.layout), inventory.sizes(found.prefix), where, name)


def _refuse_mixture(parsed: MoEName, name: str, value: Any, marked: dict[LayerKey, bool]) -> None:
    is_destination = destinations.native_of(value) is not None
    if marked.setdefault(parsed.layer_key, is_destination) != is_destination:
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
