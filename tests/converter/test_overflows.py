"""Counting what a cast has made infinite: in the range that counts, by chunks, of values that were finite."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gemma4_moe.checkpoint import hashing
from gemma4_moe.converter import overflows
from gemma4_moe.converter.overflows import can_overflow, overflows_by_chunk
from gemma4_moe.layout import dtypes

POSITION = 8200  # of the first element in the file: not at the edge of a chunk
COUNT = 6000


@pytest.fixture
def source() -> np.ndarray:
    """Every third value is beyond fp16's range, every fifth was never finite."""
    values = np.random.default_rng(7).standard_normal(COUNT).astype(np.float32)
    values[::3] *= 1e6
    values[values == 0] = 1
    values[::5] = [np.inf, -np.inf, np.nan] * (COUNT // 15)
    return values


def counted(source: np.ndarray, start: int, end: int) -> Counter[int]:
    """One element after the other."""
    found: Counter[int] = Counter()
    for number, value in enumerate(source.tolist()):
        place = POSITION + 2 * number
        if start <= place < end and np.isfinite(value) and abs(value) >= 65_520:  # rounds to infinity in fp16
            found[place // 4096] += 1
    return found


@pytest.mark.parametrize("piece", [2**20, 100])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (POSITION, POSITION + 2 * COUNT),
        (12_288, 16_384),
        (POSITION, 12_288),
        (16_384, POSITION + 2 * COUNT),
        (9000, 9000),
    ],
)
def test_only_the_range_that_is_written_counts(
    start: int, end: int, piece: int, source: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(overflows, "_PIECE", piece)
    with np.errstate(over="ignore"):
        result = source.astype(np.float16)
    expected = counted(source, start, end)
    assert (sum(expected.values()) > 100) == (start < end)
    assert overflows_by_chunk(source, result, start, end, POSITION) == expected


def test_the_source_may_be_a_view_of_another_order(source: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 4096)
    shaped = source.reshape(3, 50, 40)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(shaped.swapaxes(1, 2).astype(np.float16))
    flat = np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(-1)
    end = POSITION + 2 * COUNT
    assert overflows_by_chunk(shaped.swapaxes(1, 2), result, POSITION, end, POSITION) == counted(flat, POSITION, end)


def test_a_dtype_overflows_where_its_largest_value_is_smaller() -> None:
    floats = [dtypes.FLOAT32, dtypes.BFLOAT16, dtypes.FLOAT16]
    for old in floats:
        for new in floats:
            largest = float(np.finfo(np.float32).max) if old is dtypes.FLOAT32 else 3.3895e38
            largest = 65_504.0 if old is dtypes.FLOAT16 else largest
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(np.float32(largest).astype(new.numpy())))
            assert can_overflow(old, new) != fits, (old.name, new.name)
