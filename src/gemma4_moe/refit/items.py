"""What a stream sends, in order, and what each tensor is made from: told by names, shapes and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch.distributed.tensor import DTensor

from gemma4_moe.errors import InputError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import MoEName, layer_of, natural_key
from gemma4_moe.layout.table import (
    DOWN,
    EXPERT_ROWS,
    EXPERT_RULES,
    SCALE,
    ExpertRow,
    Layout,
    Operation,
    converted_shape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.inventory import Inventory

Experts = Literal["fused", "per-expert"]


class Planned(NamedTuple):
    """One tensor of a stream, as `json` can write it.

    Attributes:
        name: Its hf name.
        shape: Its shape.
        dtype: torch's name of its dtype, such as "bfloat16".
        nbytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a stream and what makes it.

    Attributes:
        name: Its hf name.
        shape: Its shape.
        dtype: Its dtype.
        native: Name of the native tensor that it is made from, or, for ones, whose device it shares.
        operation: What stands between the two.
        expert: Number of the one expert that it holds, or None.
        row: Which part of that expert, or None.
        mapping: Number of the mapping, of those that make up the state, that has the native tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    native: str
    operation: Operation
    expert: int | None = None
    row: ExpertRow | None = None
    mapping: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def planned(self) -> Planned:
        """What the plan says of it."""
        return Planned(self.name, self.shape, self.dtype.name, self.nbytes)


class Source(NamedTuple):
    """What is known of a native tensor without its values.

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
    def of(cls, tensor: torch.Tensor) -> Source:
        """Describe a tensor."""
        mesh, placements = (tensor.device_mesh, str(tensor.placements)) if isinstance(tensor, DTensor) else (None, "")
        return cls(tuple(tensor.shape), str(tensor.dtype), mesh, placements)


def items_of(
    sources: Mapping[str, Source],
    inventory: Inventory,
    dtype: DType | None,
    experts: Experts,
    excluded: Callable[[str, str], bool],
    mapping: int,
) -> list[Item]:
    """Return what the native tensors of one mapping become, in the order in which a stream sends them.

    Args:
        sources: The tensors by name.
        inventory: Where they are taken in.
        dtype: The dtype of every floating-point tensor, or None to keep each one's own.
        experts: Whether experts stay together.
        excluded: Says of an hf and a nemo name that the tensor is left out.
        mapping: Number of the mapping.
    """
    items = []
    for native, source in sources.items():
        parsed = inventory.add(native, source.shape)
        own = dtypes.named(source.dtype)
        _check_expert_dtype(parsed, native, own)
        into = dtypes.cast_to(own, dtype)
        operation = Operation.KEEP if parsed is None else parsed.rule.operation
        name = native if parsed is None else parsed.hf
        item = Item(name, converted_shape(operation, source.shape), into, native, operation, mapping=mapping)
        items.append(item)
        if parsed is not None and parsed.rule is DOWN:
            ones = parsed.sibling(SCALE).hf
            items.append(Item(ones, source.shape[:1], into, native, Operation.FOLD, mapping=mapping))
    items = [item for item in items if not excluded(item.name, item.native)]
    items.sort(key=lambda item: natural_key(item.name))
    if experts == "fused":
        return items
    return [part for item in items for part in _by_expert(item)]


def only_layers(items: list[Item], layers: Collection[int], inventory: Inventory) -> list[Item]:
    """Return the items of the decoder layers with these numbers.

    Raises:
        UsageError: There is no such layer.
    """
    prefixes = {prefix for prefix, _ in inventory.layers}
    there = {place[1] for item in items if (place := layer_of(item.native)) is not None and place[0] in prefixes}
    if set(layers) - there:
        raise UsageError(
            "no such layer",
            expected=f"some of {sorted(there)}",
            found=sorted(set(layers) - there),
            hint="give the numbers of decoder layers that the state has",
        )
    wanted = {(prefix, layer) for prefix in prefixes for layer in layers}
    return [item for item in items if layer_of(item.native) in wanted]


def require_complete(inventory: Inventory) -> None:
    """Check that no layer has only one of its two expert tensors, and that there is a layer with experts.

    Raises:
        IncompleteExpertsError: A layer lacks one.
        InputError: There is none.
    """
    inventory.require_complete(EXPERT_RULES[Layout.NEMO])
    if not inventory.layers:
        raise InputError("a state without mixture-of-experts layers", hint="give the state of a model in nemo layout")


def expert_parts(name: MoEName, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, int], int, ExpertRow]]:
    """Yield name, shape, expert and row of every expert's parts of a fused hf tensor [E, rows, columns]."""
    rows = EXPERT_ROWS[name.rule]
    for expert in range(shape[0]):
        for row in rows:
            yield name.of_expert(row, expert), (shape[1] // len(rows), shape[2]), expert, row


def _by_expert(item: Item) -> Iterator[Item]:
    place = layer_of(item.native)
    rule = next((rule for rule in EXPERT_ROWS if rule.operation is item.operation), None)
    if rule is None or place is None:
        yield item
        return
    for name, shape, expert, row in expert_parts(MoEName(*place, rule), item.shape):
        yield Item(name, shape, item.dtype, item.native, item.operation, expert, row, item.mapping)


def _check_expert_dtype(parsed: MoEName | None, native: str, dtype: DType) -> None:
    if parsed is not None and parsed.rule.operation is not Operation.KEEP:
        dtypes.require_expert_dtype(native, dtype.name, "stream the unquantised training weights")
