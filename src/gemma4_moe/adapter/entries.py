"""The entries of a state dict: each is checked, and read only when its values are needed.

A value is a tensor, or lazy in the protocol of safetensors' slices: `get_shape`, `get_dtype` and `__getitem__`. An
entry whose name is the same in both layouts may hold any other object, such as the `_extra_state` of some modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations
from gemma4_moe.distributed.placements import placed_on, whole_shape
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import LayerKey, MoEName, lookup
from gemma4_moe.layout.prefix_forms import decoder_read
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import EXPERT_RULES, Layout, Operation

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.interface import StateDict
    from gemma4_moe.layout.inventory import Inventory


class Entry(NamedTuple):
    """One entry of a state dict."""

    parsed: MoEName | None  # None for a name that is the same in both layouts
    name: str
    value: Any
    shape: tuple[int, ...]  # the whole tensor's, even if the value is only a rank's shard of it

    @property
    def operation(self) -> Operation:
        """The operation between this entry and its counterpart in the other layout."""
        return Operation.KEEP if self.parsed is None else self.parsed.rule.operation

    def read(self) -> Any:
        """Return the value itself, or the whole tensor of a lazy value."""
        return self.value[...] if _is_lazy(self.value) else self.value


def checked(
    state_dict: StateDict,
    inventory: Inventory,
    mesh: DeviceMesh | None = None,
) -> Iterator[Entry]:
    """Yield the entries of `state_dict` in its order, each checked against `inventory`.

    A mapping can be read twice, so all of it is checked before its first entry is given. Any other iterable is
    consumed entry by entry, and no value is held once the next one is asked for. Plain values may be sharded over
    `mesh`. An entry that the inventory leaves out is skipped before it is checked.
    """
    rules = EXPERT_RULES[inventory.layout]
    if isinstance(state_dict, Mapping):
        entries = list(_one_by_one(state_dict.items(), inventory, mesh))
        inventory.require_complete(rules)
        yield from entries
    else:
        yield from _one_by_one(state_dict, inventory, mesh)
        inventory.require_complete(rules)


def _one_by_one(pairs: Iterable[tuple[str, Any]], inventory: Inventory, mesh: DeviceMesh | None) -> Iterator[Entry]:
    has_destinations: dict[LayerKey, bool] = {}
    for name, value in pairs:
        if inventory.leaves_out(name):
            inventory.leave_out(name)
            continue
        entry = check(name, value, inventory, mesh)
        if entry.parsed is not None and entry.operation is not Operation.KEEP:
            is_destination = destinations.native_of(value) is not None
            if has_destinations.setdefault(entry.parsed.layer_key, is_destination) != is_destination:
                raise UsageError(
                    "a layer with both destinations and ordinary tensors",
                    tensor=name,
                    expected="all of the layer's expert tensors as `to_hf(for_checkpoint_load=True)` returned them",
                    found="one of them replaced, or copied by clone, detach or contiguous",
                    hint="give the destinations themselves, or ordinary tensors for the whole layer",
                )
        yield entry
        del entry, value  # or it would stay alive while the next one is made


def check(name: str, value: Any, inventory: Inventory, mesh: DeviceMesh | None = None) -> Entry:
    """Return one entry with its name, shape and dtype checked. Errors are those of `checked`."""
    is_lazy, layout = _is_lazy(value), inventory.layout
    if layout is Layout.HF:
        name = decoder_read(name)
    if not is_lazy and not isinstance(value, torch.Tensor) and lookup(name, layout) is not None:
        expected = "a torch tensor, or a lazy slice of safetensors"
        raise TensorShapeError("a value that is no tensor", tensor=name, expected=expected, found=type(value).__name__)
    shape = tuple(value.get_shape() if is_lazy else getattr(value, "shape", ()))
    if mesh is not None and not isinstance(value, DTensor):
        shape = _whole_shape(name, shape, inventory, mesh)
    return Entry(inventory.add(name, shape, dtype_of(value)), name, value, shape)


def dtype_of(value: Any) -> str | None:
    """Return torch's name of a value's dtype, None for a value that has none."""
    if _is_lazy(value):
        return dtypes.BY_TAG[value.get_dtype()].name
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None


def _whole_shape(name: str, shape: tuple[int, ...], inventory: Inventory, mesh: DeviceMesh) -> tuple[int, ...]:
    """Return the whole tensor's shape, given that of a plain value, maybe a shard."""
    found = lookup(name, inventory.layout)
    if found is None or found.part != WHOLE or found.rule.operation is Operation.KEEP:
        return shape
    rule, where = found.rule, placed_on(mesh, name)
    if inventory.layout is Layout.HF:
        where = where.converted(rule.operation, len(rule.hf_axes)) if rule.in_nemo else where.of_experts()
    return whole_shape(shape, rule.axes(inventory.layout), inventory.sizes(found.prefix), where, name)


def _is_lazy(value: Any) -> bool:
    return hasattr(value, "get_shape")
