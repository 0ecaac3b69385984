"""Any shape and any strides on both sides: the right bits inside, and nothing written outside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.raw_kernels import KERNELS, run_cpu
from support.rounding import FACTORS, FORMATS, assert_same_bits, codes, expected, random_codes

SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 70])


@st.composite
def strided(draw, shape, dtype, rng, *, broadcasts):
    """An array of `shape` somewhere in a larger buffer: axes permuted, stepped, reversed, at any byte offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in shape]
    margins = [draw(st.integers(0, 3)) for _ in shape]
    spans = [shape[axis] * abs(steps[axis]) + margins[axis] for axis in order]
    offset = draw(st.integers(0, 5))
    raw = np.full(int(np.prod(spans)) * dtype.itemsize + offset + 64, 0xA5, np.uint8)
    view = raw[offset : offset + int(np.prod(spans)) * dtype.itemsize].view(dtype).reshape(spans)
    view = view.transpose([order.index(axis) for axis in range(len(shape))])
    for axis, size in enumerate(shape):
        first = margins[axis] // 2
        window = [slice(None)] * len(shape)
        window[axis] = slice(first, first + size * abs(steps[axis]), abs(steps[axis]))
        view = view[tuple(window)]
        if steps[axis] < 0:
            view = np.flip(view, axis)
    assert view.shape == shape
    view[...] = random_codes(rng, shape, dtype)
    if broadcasts and shape and draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        if shape[axis] > 0:
            view = np.broadcast_to(np.take(view, [0], axis), shape)
    return raw, view


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    leading = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    shape = (*leading, draw(SIZES), draw(SIZES))
    source = draw(st.sampled_from(list(FORMATS)))
    target = draw(st.sampled_from(list(FORMATS)))
    _, x = draw(strided(shape, source, rng, broadcasts=True))
    buffer, out = draw(strided(shape, target, rng, broadcasts=False))
    factors = rng.choice(FACTORS, shape[0]) if draw(st.booleans()) else None
    return x, factors, buffer, out


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_strides(name, case):
    x, factors, buffer, out = case
    wanted = expected(x, factors, out.dtype)
    untouched = _outside(buffer, out)
    KERNELS[name](x, factors, out)
    assert_same_bits(out, wanted)
    assert (untouched == _outside(buffer, out)).all()


def _outside(buffer, out):
    """The buffer with the result blanked out of it."""
    kept = out.copy()
    codes(out)[...] = 0
    blank = buffer.copy()
    out[...] = kept
    return blank


@pytest.mark.parametrize("factors", [None, FACTORS[:3]], ids=["plain", "scaled"])
@pytest.mark.parametrize("target", FORMATS, ids=str)
@pytest.mark.parametrize("source", FORMATS, ids=str)
def test_large_results_are_streamed_past_the_caches(source, target, factors):
    threads = 3
    x = random_codes(np.random.default_rng(threads), (3, 2112 // target.itemsize, 701), source)
    wanted = expected(x, factors, target)
    for view, result in ((x, wanted), (x.swapaxes(1, 2), wanted.swapaxes(1, 2))):
        for offset in (0, 2 * target.itemsize):
            size = result.size * target.itemsize
            raw = np.full(size + 256, 0x5A, np.uint8)
            first = -raw.ctypes.data % 64 + offset
            out = raw[first : first + size].view(target).reshape(result.shape)
            run_cpu(view, factors, out, threads=threads)
            assert_same_bits(out, np.ascontiguousarray(result))
            assert (raw[:first] == 0x5A).all()
            assert (raw[first + size :] == 0x5A).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_aligned_rows_of_a_larger_buffer(dtype):
    """Where a bucket or a sharded tensor is filled: whole tiles, aligned rows, gaps between them."""
    rng = np.random.default_rng(5)
    x = random_codes(rng, (2, 1024, 544), dtype)
    buffer = np.zeros((2, 544, 1024 + 64), dtype)
    raw = np.zeros(buffer.nbytes + 64, np.uint8)
    first = -raw.ctypes.data % 64
    buffer = raw[first : first + buffer.nbytes].view(dtype).reshape(buffer.shape)
    run_cpu(x, FACTORS[3:5], buffer[..., :1024].swapaxes(1, 2), threads=2)
    assert_same_bits(buffer[..., :1024], expected(x, FACTORS[3:5], dtype).swapaxes(1, 2))
    assert not codes(buffer[..., 1024:]).any()
