"""Counting what a cast has made infinite: of values that were finite, in any order of the source's axes."""

from __future__ import annotations

import numpy as np
import pytest

from gemma4_moe.converter import steps
from gemma4_moe.converter.steps import can_overflow, count_overflows
from gemma4_moe.layout import dtypes

COUNT = 6000


@pytest.fixture
def source() -> np.ndarray:
    """Every third value is beyond fp16's range, every fifth was never finite."""
    values = np.random.default_rng(7).standard_normal(COUNT).astype(np.float32)
    values[::3] *= 1e6
    values[values == 0] = 1
    values[::5] = [np.inf, -np.inf, np.nan] * (COUNT // 15)
    return values


def counted(source: np.ndarray) -> int:
    """One element after the other."""
    return sum(1 for value in source.tolist() if np.isfinite(value) and abs(value) >= 65_520)  # infinite in fp16


@pytest.mark.parametrize("piece", [2**20, 1000, 7])
@pytest.mark.parametrize("shape", [(COUNT,), (3, 50, 40)])
def test_finite_values_that_became_infinite_are_counted(
    shape: tuple[int, ...], piece: int, source: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_PIECE", piece)
    shaped = source.reshape(shape)
    with np.errstate(over="ignore"):
        result = shaped.astype(np.float16)
        exchanged = np.ascontiguousarray(result.swapaxes(-1, -2)) if len(shape) > 1 else result
    assert counted(source) > 100
    assert count_overflows(shaped, result) == counted(source)
    if len(shape) > 1:
        assert count_overflows(shaped.swapaxes(1, 2), exchanged) == counted(source)
    assert count_overflows(shaped[:0], result[:0]) == 0


def test_a_dtype_overflows_where_its_largest_value_is_smaller() -> None:
    floats = [dtypes.FLOAT32, dtypes.BFLOAT16, dtypes.FLOAT16]
    for old in floats:
        for new in floats:
            largest = float(np.finfo(np.float32).max) if old is dtypes.FLOAT32 else 3.3895e38
            largest = 65_504.0 if old is dtypes.FLOAT16 else largest
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(np.float32(largest).astype(new.numpy())))
            assert can_overflow(old, new) != fits, (old.name, new.name)
