"""What operations do to shapes and axes, against what torch does to tensors, for every row of the table."""

from __future__ import annotations

import pytest
import torch

from gemma4_moe.layout.dtypes import BFLOAT16, EXPERT_DTYPES, FLOAT8_E4M3, FLOAT16, FLOAT32, DType, is_exact
from gemma4_moe.layout.table import (
    DOWN,
    GATE_UP,
    ROUTER_SCALE,
    ROUTER_WEIGHT,
    RULES,
    SCALE,
    Layout,
    Operation,
    Rule,
    converted_axis,
    converted_shape,
    shape_of,
    transposes,
)

SIZES = {"E": 6, "H": 10, "I": 7}
SHAPES = {
    Layout.HF: {GATE_UP: (6, 14, 10), DOWN: (6, 10, 7), SCALE: (6,), ROUTER_WEIGHT: (6, 10), ROUTER_SCALE: (10,)},
    Layout.NEMO: {GATE_UP: (6, 10, 14), DOWN: (6, 7, 10), ROUTER_WEIGHT: (6, 10), ROUTER_SCALE: (10,)},
}


@pytest.mark.parametrize("layout", Layout)
def test_shapes_are_those_of_the_format(layout: Layout) -> None:
    found = {rule: shape_of(rule, layout, SIZES) for rule in RULES if rule.axes(layout)}
    assert found == SHAPES[layout]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.in_nemo], ids=lambda rule: rule.role)
def test_the_operation_leads_from_one_column_of_the_table_to_the_other_and_back(rule: Rule) -> None:
    there = converted_shape(rule.operation, SHAPES[Layout.HF][rule])
    assert there == SHAPES[Layout.NEMO][rule]
    assert converted_shape(rule.operation, there) == SHAPES[Layout.HF][rule]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.in_nemo], ids=lambda rule: rule.role)
def test_each_axis_goes_where_the_table_says(rule: Rule) -> None:
    ndim = len(rule.hf_axes)
    moved = {rule.hf_axes[axis]: converted_axis(rule.operation, axis, ndim) for axis in range(ndim)}
    assert moved == {letter: axis for axis, letter in enumerate(rule.nemo_axes)}


@pytest.mark.parametrize(
    ("operation", "ndim"),
    [(operation, ndim) for operation in Operation for ndim in (1, 2, 3, 4) if ndim > 1 or not transposes(operation)],
)
def test_axes_move_as_shapes_do(operation: Operation, ndim: int) -> None:
    shape = tuple(range(2, 2 + ndim))
    converted = converted_shape(operation, shape)
    assert [converted[converted_axis(operation, axis, ndim)] for axis in range(ndim)] == list(shape)
    expected = torch.empty(shape).transpose(-1, -2).shape if transposes(operation) else shape
    assert converted == expected


@pytest.mark.parametrize("model", EXPERT_DTYPES, ids=lambda dtype: dtype.tag)
@pytest.mark.parametrize("file", [*EXPERT_DTYPES, FLOAT8_E4M3], ids=lambda dtype: dtype.tag)
def test_a_load_in_place_is_exact_where_the_model_holds_every_value_of_the_file(file: DType, model: DType) -> None:
    inexact = {(FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT16, BFLOAT16), (BFLOAT16, FLOAT16)}
    assert is_exact(file, model) == ((file, model) not in inexact)
