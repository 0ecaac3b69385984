"""The tensors of a stream in their order, and the sources of each, from names, shapes and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch.distributed.tensor import DTensor

from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.layout import dtypes, spellings
from gemma4_moe.layout.names import layer_of
from gemma4_moe.layout.spellings import CURRENT, WHOLE, Part, Spelling
from gemma4_moe.layout.table import EXPERT_RULES, Layout, Operation
from gemma4_moe.layout.targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.inventory import Inventory

Experts = Literal["fused", "per-expert"]


def form_of(experts: str) -> Spelling:
    """Return the form of the hf layout that the argument `experts` of a stream names.

    Raises:
        UsageError: No form that can be written has this name.
    """
    forms = {"fused": CURRENT} | {form.name: form for form in spellings.SPELLINGS if form.writable and form != CURRENT}
    if experts not in forms:
        raise UsageError("no such value of experts", expected=" or ".join(forms), found=repr(experts))
    return forms[experts]


class Planned(NamedTuple):
    """One tensor of a stream, as `json` can write it.

    Attributes:
        name: Its hf name.
        dtype: torch's name of its dtype, such as "bfloat16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a stream, and the native tensor that it is made from.

    Attributes:
        name: Its hf name.
        native: Name of the native tensor. Ones are made on its device.
        operation: The operation between the two.
        part: Its share of its role's hf tensor.
        mapping: Number of the state's mapping that has the native tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    native: str
    operation: Operation
    part: Part = WHOLE
    mapping: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def planned(self) -> Planned:
        """Its line of the plan."""
        return Planned(self.name, self.shape, self.dtype.name, self.nbytes)


class TensorFacts(NamedTuple):
    """A native tensor without its values.

    Attributes:
        shape: The whole tensor's shape.
        dtype: torch's name of its dtype.
        mesh: The mesh of a DTensor.
        placements: Its placements, as text.
    """

    shape: tuple[int, ...]
    dtype: str
    mesh: DeviceMesh | None
    placements: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorFacts:
        """Return the facts of a tensor."""
        mesh, placements = (tensor.device_mesh, str(tensor.placements)) if isinstance(tensor, DTensor) else (None, "")
        return cls(tuple(tensor.shape), str(tensor.dtype), mesh, placements)


class Native(NamedTuple):
    """A native tensor and the number of the mapping that has it."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    mapping: int


def items_of(
    mappings: Sequence[Mapping[str, TensorFacts]],
    inventory: Inventory,
    dtype: DType | None,
    form: Spelling,
    excluded: Callable[[str, str], bool],
) -> list[Item]:
    """Return the hf tensors of a state, in the order in which a stream sends them.

    Args:
        mappings: The native tensors of each mapping by name.
        inventory: An empty one, which then holds the tensors.
        dtype: The dtype of every floating-point tensor, or None to keep each one's own.
        form: The form in which experts are sent.
        excluded: Returns whether a tensor is skipped, from its hf name and its nemo name.

    Raises:
        InputError: See `targets_of`; or there is no layer with experts.
    """
    natives = (
        Native(name, source.shape, dtypes.named(source.dtype), number)
        for number, sources in enumerate(mappings)
        for name, source in sources.items()
    )
    targets = targets_of(natives, inventory, EXPERT_RULES[Layout.NEMO], dtype, form)
    if not inventory.layers:
        raise InputError("a state without mixture-of-experts layers", hint="give the state of a model in nemo layout")
    return [
        Item(t.name, t.shape, t.dtype, t.origin.name, t.operation, t.part, t.origin.mapping)
        for t in sorted(targets.values(), key=lambda target: target.origin.mapping)
        if not excluded(t.role, t.origin.name)
    ]


def only_layers(items: list[Item], layers: Collection[int], inventory: Inventory) -> list[Item]:
    """Return the items of the decoder layers with these numbers.

    Raises:
        UsageError: There is no such layer.
    """
    prefixes = {prefix for prefix, _ in inventory.layers}
    keys = [layer_of(item.native) for item in items]
    there = {key[1] for key in keys if key is not None and key[0] in prefixes}
    absent = sorted(set(layers) - there)
    if absent:
        hint = "give the numbers of decoder layers that the state has"
        raise UsageError("no such layer", expected=f"some of {sorted(there)}", found=absent, hint=hint)
    wanted = {(prefix, layer) for prefix in prefixes for layer in layers}
    return [item for item, key in zip(items, keys, strict=True) if key in wanted]
