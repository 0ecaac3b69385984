"""The tensors of a stream in their order, and the sources of each, from names, shapes and dtypes alone."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from torch.distributed.tensor import DTensor

from gemma4_moe.errors import DuplicateTensorError, InputError, UsageError
from gemma4_moe.layout import spellings
from gemma4_moe.layout.dtypes import cast_to, named, target_dtype
from gemma4_moe.layout.names import layer_of, lookup
from gemma4_moe.layout.spellings import CURRENT, Spelling
from gemma4_moe.layout.table import EXPERT_RULES, Layout
from gemma4_moe.layout.targets import Target, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.to_hf import Excluded
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.inventory import Inventory

    #: A dtype, or torch's name of it; None keeps each tensor's own.
    Dtype = torch.dtype | str | None

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
        mesh, placements = (tensor.device_mesh, _text(tensor.placements)) if isinstance(tensor, DTensor) else (None, "")
        return cls(name, tuple(tensor.shape), _dtype(tensor.dtype), mapping, mesh, placements)

    def fit(self, tensor: torch.Tensor) -> bool:
        """Return whether they are those of a tensor."""
        if tensor.shape != self.shape or _dtype(tensor.dtype) is not self.dtype:  # one object for each dtype
            return False
        if not isinstance(tensor, DTensor):
            return self.mesh is None
        return tensor.device_mesh is self.mesh and _text(tensor.placements) == self.placements


#: Every pass asks for these of every tensor.
_text = lru_cache(maxsize=256)(str)


@lru_cache(maxsize=64)
def _dtype(dtype: torch.dtype) -> DType:
    return named(str(dtype))


#: One tensor of a stream: an hf tensor, and the native tensor that it is made from. Ones are made on the device of
#: their `origin`.
Item: TypeAlias = Target[TensorFacts]


def layout_of(natives: Iterable[TensorFacts]) -> Layout:
    """Return the layout that the names of the experts are in; an InputError if they are in both or in none."""
    layouts = {layout: [facts.name for facts in natives if _is_expert(facts.name, layout)] for layout in Layout}
    found = [layout for layout, names in layouts.items() if names]
    if not found:
        raise InputError("a state without mixture-of-experts layers", hint="give the state of a Gemma 4 MoE model")
    if len(found) > 1:
        raise InputError(
            "a state in both layouts",
            tensor=layouts[Layout.HF][0],
            expected=f"names of one layout, as {layouts[Layout.NEMO][0]}",
            found=f"{len(layouts[Layout.HF])} names of the hf layout, {len(layouts[Layout.NEMO])} of the nemo layout",
            hint="give the state of one model",
        )
    return found[0]


def _is_expert(name: str, layout: Layout) -> bool:
    found = lookup(name, layout)
    return found is not None and found.rule in EXPERT_RULES[layout]


def items_of(
    natives: Sequence[TensorFacts],
    inventory: Inventory,
    form: Spelling,
    excluded: Excluded,
    dtype: Callable[[str], DType | None],
    rename: Callable[[str], str | None],
) -> list[Item]:
    """Return the hf tensors of a state, in the order in which a stream sends them.

    Args:
        natives: The tensors of all mappings, in the inventory's layout.
        inventory: One that holds none of them, and then all.
        form: The form in which experts are sent.
        excluded: Returns whether a tensor is skipped, from its hf name and its nemo name.
        dtype: Returns the dtype of a floating-point tensor by its hf name, or None to keep its own.
        rename: Returns the name under which a tensor is sent by its hf name, or None to leave it out.

    Raises:
        InputError: See `targets_of`; or two tensors would have one name.
    """
    targets = targets_of(natives, inventory, EXPERT_RULES[inventory.layout], spelling=form, to=Layout.HF)
    items: dict[str, Item] = {}
    for target in sorted(targets.values(), key=lambda target: target.origin.mapping):
        found = lookup(target.role, Layout.HF)
        name = None if excluded(target.role, target.role if found is None else found.nemo) else rename(target.name)
        if name is None:
            continue
        if name in items:
            known, hint = items[name].role, "let `names` give every tensor a name of its own"
            raise DuplicateTensorError(
                "two tensors under one name", tensor=target.name, found=f"{name}, as {known}", hint=hint
            )
        items[name] = replace(target, name=name, dtype=cast_to(target.dtype, dtype(target.name)))
    return list(items.values())


def dtype_of(given: Dtype | Callable[[str], Dtype]) -> Callable[[str], DType | None]:
    """Return a function that gives the dtype to cast a tensor to by its hf name."""

    def known(dtype: Dtype) -> DType | None:
        return None if dtype is None else target_dtype(str(dtype).removeprefix("torch."))

    if callable(given):
        return lambda name: known(given(name))
    one = known(given)
    return lambda _: one


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
