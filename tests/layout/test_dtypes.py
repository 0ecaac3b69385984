"""Dtypes: names and sizes against NumPy and safetensors, and "exact" against every value that there is."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save

from gemma4_moe.errors import InputError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.dtypes import (
    ALL,
    BFLOAT16,
    EXPERT_DTYPES,
    FLOAT8_E4M3,
    FLOAT16,
    FLOAT32,
    FloatFormat,
    is_exact,
)

COMPUTED = (*EXPERT_DTYPES, FLOAT8_E4M3)


def test_no_name_and_no_tag_means_two_dtypes():
    assert len({dtype.tag for dtype in ALL}) == len({dtype.name for dtype in ALL}) == len(ALL)


@pytest.mark.parametrize("dtype", ALL, ids=lambda dtype: dtype.tag)
def test_numpy_has_it_under_the_same_name_with_the_same_size(dtype):
    found = dtype.numpy()
    assert found.name == dtype.name
    assert found.itemsize == max(dtype.itemsize, 1)
    assert dtype.itemsize == dtype.bits // 8


@pytest.mark.parametrize("dtype", [d for d in ALL if hasattr(torch, d.name)], ids=lambda dtype: dtype.tag)
def test_safetensors_writes_the_torch_dtype_under_this_tag(dtype):
    raw = save({"x": torch.zeros(4, dtype=torch.uint8).view(torch.uint8).to(getattr(torch, dtype.name))})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["x"]["dtype"] == dtype.tag
    assert header["x"]["data_offsets"] == [0, 4 * dtype.bits // 8]


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_name_is_found_with_and_without_torch(name):
    assert dtypes.named(name) is BFLOAT16


@pytest.mark.parametrize("name", ["BF16", "torch.torch.bfloat16", "float", "numpy.float32", "", "bfloat16 "])
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(InputError, match="unknown dtype") as raised:
        dtypes.named(name)
    assert raised.value.facts["found"] == name
    assert "bfloat16, float16, float32" in raised.value.facts["expected"]


def every_finite_value(dtype):
    """All finite values of a dtype of at most 16 bits; of fp32, those around every edge of the others."""
    if dtype.bits <= 16:
        bits = np.arange(1 << dtype.bits).astype(f"u{dtype.itemsize}")
    else:
        edges = np.concatenate([every_finite_value(d).astype(np.float32) for d in (BFLOAT16, FLOAT16, FLOAT8_E4M3)])
        bits = (edges.view(np.uint32)[:, None] + np.array([0, 1], np.uint32)).ravel()
    values = bits.view(dtype.numpy())
    with np.errstate(invalid="ignore"):
        return values[np.isfinite(values)]


@pytest.mark.parametrize("target", COMPUTED, ids=lambda dtype: dtype.tag)
@pytest.mark.parametrize("source", COMPUTED, ids=lambda dtype: dtype.tag)
def test_exact_means_that_every_finite_value_comes_back(source, target):
    values = every_finite_value(source)
    with np.errstate(over="ignore", invalid="ignore"):
        there = values.astype(target.numpy()).astype(np.float64)
    came_back = np.array_equal(there, values.astype(np.float64))
    assert is_exact(source, target) == came_back


def test_between_dtypes_that_are_not_computed_with_only_the_identity_is_exact():
    int64, uint8 = dtypes.named("int64"), dtypes.named("uint8")
    assert is_exact(int64, int64)
    assert not is_exact(uint8, int64)
    assert not is_exact(uint8, FLOAT32)
    assert not is_exact(FLOAT16, dtypes.named("float64"))


@pytest.mark.parametrize("dtype", COMPUTED, ids=lambda dtype: dtype.tag)
def test_formats_are_those_of_the_dtype(dtype):
    info = ml_dtypes.finfo(dtype.numpy())
    assert dtype.float_format is not None
    assert dtype.float_format.precision == info.nmant + 1
    assert dtype.float_format.min_exponent == info.minexp
    assert 2.0**dtype.float_format.max_exponent <= float(info.max) < 2.0 ** (dtype.float_format.max_exponent + 1)


@pytest.mark.parametrize(
    ("wide", "held"),
    [
        (FloatFormat(8, 127, -126), True),
        (FloatFormat(9, 127, -125), True),  # one more bit reaches as far down as one more exponent
        (FloatFormat(7, 127, -126), False),
        (FloatFormat(8, 126, -126), False),
        (FloatFormat(8, 127, -125), False),
        (FloatFormat(24, 1023, -100), False),
    ],
)
def test_a_format_holds_another_up_and_down_to_its_last_subnormal(wide, held):
    assert wide.holds(FloatFormat(8, 127, -126)) == held


def test_a_cast_is_of_the_floats_that_are_computed_with_and_of_nothing_else():
    assert [dtypes.cast_to(own, FLOAT16) for own in (BFLOAT16, FLOAT32, FLOAT16)] == [FLOAT16] * 3
    for name in ("int64", "bool", "uint8", "float64", "complex64"):
        assert dtypes.cast_to(dtypes.BY_NAME[name], FLOAT16) is dtypes.BY_NAME[name]
    assert all(dtypes.cast_to(own, None) is own for own in ALL)
