"""The table: its rows, and what operations do to shapes and axes, against what torch does to tensors."""

import itertools

import pytest
import torch

from gemma4_moe.layout.dtypes import BFLOAT16, EXPERT_DTYPES, FLOAT8_E4M3, FLOAT16, FLOAT32, is_exact
from gemma4_moe.layout.table import (
    DOWN,
    EXPERT_RULES,
    GATE_UP,
    ROUTER_SCALE,
    ROUTER_WEIGHT,
    RULES,
    SCALE,
    Layout,
    Operation,
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


def test_the_operations_and_axes_are_those_of_the_format():
    found = {rule.role: (rule.operation, " ".join(rule.hf_axes), " ".join(rule.nemo_axes)) for rule in RULES}
    assert found == {
        "gate_up": (Operation.TRANSPOSE, "E 2I H", "E H 2I"),
        "down": (Operation.TRANSPOSE_SCALE, "E H I", "E I H"),
        "scale": (Operation.FOLD, "E", ""),
        "router weight": (Operation.KEEP, "E H", "E H"),
        "router scale": (Operation.KEEP, "H", "H"),
    }
    assert EXPERT_RULES == {Layout.HF: (GATE_UP, DOWN, SCALE), Layout.NEMO: (GATE_UP, DOWN)}
    assert [layout.other for layout in Layout] == [Layout.NEMO, Layout.HF]


@pytest.mark.parametrize("layout", Layout)
def test_shapes_are_those_of_the_format(layout):
    found = {rule: shape_of(rule, layout, SIZES) for rule in RULES if rule.axes(layout)}
    assert found == SHAPES[layout]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.in_nemo], ids=lambda rule: rule.role)
def test_the_operation_leads_from_one_column_of_the_table_to_the_other_and_back(rule):
    there = converted_shape(rule.operation, SHAPES[Layout.HF][rule])
    assert there == SHAPES[Layout.NEMO][rule]
    assert converted_shape(rule.operation, there) == SHAPES[Layout.HF][rule]
    ndim = len(rule.hf_axes)
    moved = {rule.hf_axes[axis]: converted_axis(rule.operation, axis, ndim) for axis in range(ndim)}
    assert moved == {letter: axis for axis, letter in enumerate(rule.nemo_axes)}


@pytest.mark.parametrize(
    ("operation", "ndim"),
    [(operation, ndim) for operation in Operation for ndim in (1, 2, 3, 4) if ndim > 1 or not transposes(operation)],
)
def test_axes_move_as_shapes_do(operation, ndim):
    shape = tuple(range(2, 2 + ndim))
    converted = converted_shape(operation, shape)
    assert [converted[converted_axis(operation, axis, ndim)] for axis in range(ndim)] == list(shape)
    expected = torch.empty(shape).transpose(-1, -2).shape if transposes(operation) else shape
    assert converted == expected


@pytest.mark.parametrize("model", EXPERT_DTYPES, ids=lambda dtype: dtype.tag)
@pytest.mark.parametrize("file", [*EXPERT_DTYPES, FLOAT8_E4M3], ids=lambda dtype: dtype.tag)
def test_a_load_in_place_is_exact_where_the_model_holds_every_value_of_the_file(file, model):
    inexact = {(FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT16, BFLOAT16), (BFLOAT16, FLOAT16)}
    assert is_exact(file, model) == ((file, model) not in inexact)


def test_no_two_rows_share_a_name():
    for layout in Layout:
        names = [rule.name(layout) for rule in RULES if rule.axes(layout)]
        assert len(names) == len(set(names))
    for first, second in itertools.combinations(RULES, 2):
        assert first.role != second.role


def test_a_row_leads_to_what_it_becomes():
    assert {rule.role: [other.role for other in rule.yields(Layout.HF)] for rule in RULES if rule.in_nemo} == {
        "gate_up": ["gate_up"],
        "down": ["down", "scale"],
        "router weight": ["router weight"],
        "router scale": ["router scale"],
    }
    assert [rule.yields(Layout.NEMO) for rule in RULES] == [() if rule is SCALE else (rule,) for rule in RULES]
    assert [rule.factor for rule in RULES] == [SCALE if rule is DOWN else None for rule in RULES]
