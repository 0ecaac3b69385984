"""Tensors into which an adapter was merged: the exact values in fp64, and how far fp32 arithmetic may be from them.

A merged value is w · s + Σ b·a over the rank, in fp32, with one rounding to the target's dtype. The order of the sum is
not prescribed, so a value is right if it is the rounding of a number within the error that fp32 allows. For r products
that is (r + 6) · 2⁻²⁴ · Σ |b·a|, with the roundings of B's factors, and 2⁻²³ · |w · s| for the weight's own (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1). Where an adapter changes nothing, bits are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError
from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, SCALE, Layout
from gemma4_moe.verifier.additions import Addition
from gemma4_moe.verifier.arithmetic import reference, widen
from gemma4_moe.verifier.pieces import compare_pieces, elements, experts, factors_of, scan_expert, tiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.lora.opening import Adapter
    from gemma4_moe.verifier.additions import Matrices
    from gemma4_moe.verifier.arithmetic import Bits, Floats
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference
    from gemma4_moe.verifier.expected import Expectation
    from gemma4_moe.verifier.pieces import Check, Piece

_UNIT = 2.0**-24

#: The most that an fp32 product or sum loses below the normal numbers.
_TINY = 2.0**-149


def with_additions(
    expected: Mapping[str, Expectation], adapter: Adapter, source: Checkpoint, layout: Layout, to: Layout
) -> dict[str, Expectation]:
    """Return the expectations of a target in layout `to` with what an adapter adds to a source in `layout`.

    Raises:
        UnknownTensorError, TensorShapeError: The adapter does not fit the source.
        UsageError: It belongs to unfolded weights, and the source is folded.
    """
    scales = {}
    for own, tensor in source.tensors.items():
        found = lookup(own, layout)
        if found is not None and found.rule is SCALE:
            scales[found.layer_key] = tensor
    is_folded = Layout.NEMO in (layout, to)
    result = dict(expected)
    for module in adapter.modules.values():
        weight = module.name if module.is_experts else f"{module.name}.weight"
        parsed = lookup(weight, Layout.HF)
        name = weight if parsed is None else parsed.name(to)
        hint = "name the base that the adapter was merged into"
        if name not in expected:
            raise UnknownTensorError("the base lacks a weight of the adapter", tensor=name, file=source.path, hint=hint)
        stored = expected[name].source
        assert stored is not None, "a weight has a source"
        exchanged = module.is_experts and layout is Layout.NEMO
        shape = (*module.sides["B"].shape[:-1], module.sides["A"].shape[-1])
        if exchanged:
            shape = (shape[0], shape[2], shape[1])
        if stored.shape != shape:
            raise TensorShapeError(
                "a weight that the adapter does not fit",
                tensor=stored.name,
                file=source.path,
                expected=list(shape),
                found=list(stored.shape),
                hint=hint,
            )
        crosses = module.rule is DOWN and is_folded is not adapter.form.is_folded
        if crosses and module.layer not in scales:
            raise UsageError(
                "an adapter of unfolded weights, and a base whose scales are not known",
                tensor=name,
                file=source.path,
                expected=f"the {Layout.HF} checkpoint as the base",
                hint="name the published checkpoint as the base",
            )
        scale = scales[module.layer] if crosses and module.layer is not None else None
        addition = Addition(module, adapter.scaling_of(module), scale, not is_folded, exchanged)
        result[name] = replace(expected[name], addition=addition, scale_name=None)
    return result


def compare_merged(
    odd: Oddities, target: Values, expectation: Expectation, memory: int, check: Check
) -> list[Difference]:
    """Compare a tensor with its source and the change that an adapter makes."""
    source, addition = expectation.source, expectation.addition
    assert source is not None, "a weight has a source"
    assert addition is not None, "an adapter adds to it"
    matrices = addition.read()
    scale = [1.0] * len(matrices.b) if expectation.scale is None else factors_of(expectation.scale)
    dtypes = source.dtype, target.dtype

    def of_rows(*, scan: bool) -> Iterator[Piece]:
        rows, columns = source.shape[-2:]
        for first, old, new in elements(source, target, memory, check):
            if scan:
                odd.scan(source.name, old.view(np.uint8), source.dtype)
            expected = np.empty_like(new)
            position, last = first, first + len(old)
            while position < last:  # expert by expert, in whole rows
                expert, row = position // (rows * columns), position // columns % rows
                end = min(last, (expert + 1) * rows * columns)
                stop = -(-(end - expert * rows * columns) // columns)
                start = position - (expert * rows + row) * columns
                own = slice(position - first, end - first)
                parts = matrices.product(expert, slice(row, stop), slice(columns))
                change, size = (part.reshape(-1)[start : start + end - position] for part in parts)
                acts = matrices.acts(expert)
                expected[own] = _expected(old[own], new[own], change, size, matrices, scale[expert], dtypes, acts=acts)
                position = end
            yield (first, 0), expected[None], new[None]

    def of_experts(*, scan: bool) -> Iterator[Piece]:
        for expert, old, new in experts(source, target, memory, check):
            if scan:
                scan_expert(odd, source, expert, old)
            acts = matrices.acts(expert)
            for place, one, two, rows, columns in tiles(expert, old, new, check):
                change, size = (part.T for part in matrices.product(expert, rows, columns))
                yield place, _expected(one, two, change, size, matrices, scale[expert], dtypes, acts=acts), two

    return compare_pieces(target, of_experts if expectation.transposed else of_rows)


def _expected(
    old: Bits,
    new: Bits,
    change: Floats,
    size: Floats,
    matrices: Matrices,
    scale: float,
    dtypes: tuple[DType, DType],
    *,
    acts: bool,
) -> Bits:
    """Return the bits that are expected: those that were found where they are right, else the nearest to the exact."""
    source, target = dtypes
    if not acts:
        return reference(old, source, target, scale)
    rank = matrices.a.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        weight = widen(old, source) * scale
        exact = weight + change
        slack = (rank + 6) * _UNIT * size + 2 * _UNIT * np.abs(weight) + (rank + 6) * _TINY
        low, nearest, high = (_rounded(value, target) for value in (exact - slack, exact, exact + slack))
        found = widen(new, target)
        is_right = (widen(low, target) <= found) & (found <= widen(high, target))
        is_right |= np.isnan(exact) & np.isnan(found)
    return np.where(is_right, new, nearest)


def _rounded(values: Floats, target: DType) -> Bits:
    return reference(values.astype(np.float32).view(np.uint32), FLOAT32, target)
