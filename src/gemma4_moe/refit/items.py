"""The tensors of a stream in their order, and the sources of each, from names, shapes and dtypes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from torch.distributed.tensor import DTensor

from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.layout import spellings
from gemma4_moe.layout.dtypes import named
from gemma4_moe.layout.names import layer_of
from gemma4_moe.layout.spellings import CURRENT, Spelling
from gemma4_moe.layout.table import EXPERT_RULES, Layout
from gemma4_moe.layout.targets import Target, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.inventory import Inventory

Experts = Literal["fused", "per-expert"]


def form_of(experts: str) -> Spelling:
    """Return the writable form that a stream's argument `experts` names; another is a UsageError."""
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


class TensorFacts(NamedTuple):
    """A native tensor without its values.

    Attributes:
        shape: The whole tensor's shape.
        mapping: Number of the state's mapping that has it.
        mesh: The mesh of a DTensor.
        placements: Its placements, as text.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    mapping: int
    mesh: DeviceMesh | None
    placements: str

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str, mapping: int) -> TensorFacts:
        """Return the facts of a tensor."""
        mesh, placements = (tensor.device_mesh, str(tensor.placements)) if isinstance(tensor, DTensor) else (None, "")
        return cls(name, tuple(tensor.shape), named(str(tensor.dtype)), mapping, mesh, placements)


#: One tensor of a stream: an hf tensor, and the native tensor that it is made from. Ones are made on the device of
#: their `origin`.
Item: TypeAlias = Target[TensorFacts]


def items_of(
    natives: Sequence[TensorFacts],
    inventory: Inventory,
    dtype: DType | None,
    form: Spelling,
    excluded: Callable[[str, str], bool],
) -> list[Item]:
    """Return the hf tensors of a state, in the order in which a stream sends them.

    Args:
        natives: The native tensors of all mappings.
        inventory: An empty one, which then holds the tensors.
        dtype: The dtype of every floating-point tensor, or None to keep each one's own.
        form: The form in which experts are sent.
        excluded: Returns whether a tensor is skipped, from its hf name and its nemo name.

    Raises:
        InputError: See `targets_of`; or there is no layer with experts.
    """
    targets = targets_of(natives, inventory, EXPERT_RULES[Layout.NEMO], dtype, form)
    if not inventory.layers:
        raise InputError("a state without mixture-of-experts layers", hint="give the state of a model in nemo layout")
    ordered = sorted(targets.values(), key=lambda target: target.origin.mapping)
    return [target for target in ordered if not excluded(target.role, target.origin.name)]


def only_layers(items: list[Item], layers: Collection[int], inventory: Inventory) -> list[Item]:
    """Return the items of the decoder layers with these numbers, which must exist."""
    prefixes = {prefix for prefix, _ in inventory.layers}
    keys = [layer_of(item.origin.name) for item in items]
    there = {key[1] for key in keys if key is not None and key[0] in prefixes}
    absent = sorted(set(layers) - there)
    if absent:
        hint = "give the numbers of decoder layers that the state has"
        raise UsageError("no such layer", expected=f"some of {sorted(there)}", found=absent, hint=hint)
    wanted = {(prefix, layer) for prefix in prefixes for layer in layers}
    return [item for item, key in zip(items, keys, strict=True) if key in wanted]
