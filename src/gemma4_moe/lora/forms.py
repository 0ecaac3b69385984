"""The tensors that plain modules become in a form: names, shapes, and how values are cut."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.layout.lora import ADAPTER_PREFIX, LINEAR, LORA_ROWS, LoraForm, ParamWrapper
from gemma4_moe.layout.table import DOWN, GATE_UP
from gemma4_moe.lora.modules import shape_in, stored_from
from gemma4_moe.lora.names import linear_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.lora import LoraRow
    from gemma4_moe.lora.modules import Array, LoraModule


class Written(NamedTuple):
    """One tensor of the new form: its name, dtype and shape, and how it is cut from a plain tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    cut: Callable[[Array], Array]


def written(
    module: LoraModule, side: str, form: LoraForm, layout: ParamWrapper, modules: Mapping[str, LoraModule]
) -> Iterator[Written]:
    """Yield the tensors that A or B of a module becomes. `modules` are all of the adapter's."""
    tensor = module.sides[side]
    if not module.is_experts:
        name = f"{ADAPTER_PREFIX}{linear_in(module.name, form)}.{LINEAR[side]}"
        yield Written(name, tensor.dtype, tensor.shape, _itself)
        return
    row = next(row for row in LORA_ROWS if (row.rule, row.side) == (module.rule, side))
    stem = module.name.removesuffix(row.rule.hf)
    path = ADAPTER_PREFIX + stem
    if form is LoraForm.VLLM:
        yield from _matrices(row, path, tensor.dtype, tensor.shape)
        return
    if form is LoraForm.NEMO:
        rest, axes = row.nemo, row.nemo_axes
    else:
        is_inner = row.rule is GATE_UP and stem + DOWN.hf in modules
        rest, axes = row.peft(layout, is_inner=is_inner), row.axes_in_peft(layout)
    shape = shape_in(tensor.shape, row.axes, axes)
    yield Written(path + rest, tensor.dtype, shape, partial(stored_from, axes=row.axes, stored_axes=axes))


def _matrices(row: LoraRow, path: str, dtype: DType, shape: tuple[int, ...]) -> Iterator[Written]:
    """Yield the matrices of each expert: gate and up share A, and have the halves of B's rows."""
    experts, rows, columns = shape
    size = rows // len(row.projections) if row.side == "B" else rows
    for expert in range(experts):
        for number, projection in enumerate(row.projections):
            first = number * size if row.side == "B" else 0
            cut = partial(_matrix, expert=expert, first=first, size=size)
            yield Written(path + row.vllm(expert, projection), dtype, (size, columns), cut)


def _matrix(plain: Array, expert: int, first: int, size: int) -> Array:
    return plain[expert, first : first + size]


def _itself(plain: Array) -> Array:
    return plain
