"""Any shape, size and strides on both sides: the right bits inside, and nothing written outside."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from gemma4_moe import kernels
from support.raw_kernels import KERNELS, run_cpu
from support.rounding import BF16, FACTORS, FORMATS, FP32, assert_same_bits, codes, expected, random_codes

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


@pytest.mark.parametrize("kernel", ["numpy", "cpu"])
def test_one_axis_and_none(kernel):
    """As the converter casts norms and scalars."""
    x = np.random.default_rng(3).normal(size=11).astype(np.float32)
    scale = np.linspace(-1.5, 2.25, 11, dtype=np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert np.array_equal(kernels.scale_cast(x, dtype=dtype, kernel=kernel), x.astype(dtype))
        assert np.array_equal(kernels.scale_cast(x, scale=scale, dtype=dtype, kernel=kernel), (x * scale).astype(dtype))
        assert kernels.scale_cast(x[4:5].reshape(()), dtype=dtype, kernel=kernel) == x[4].astype(dtype)


@pytest.mark.parametrize("factors", [None, FACTORS[[0, 4]]], ids=["plain", "scaled"])
@pytest.mark.parametrize("transpose", [False, True])
def test_two_to_the_32_elements(transpose, factors):
    """A count of 32 bits would find no elements at all. Rows overlap, so that they take little memory."""
    E, R, C = 2, 1 << 16, 1 << 15
    values = np.array([1.5, -2.75], np.float32).astype(BF16)
    rows = np.repeat(values, C).reshape(E, C)
    x = as_strided(rows, (E, R, C), (rows.strides[0], 0, 2))
    x = x.swapaxes(1, 2) if transpose else x
    outer, inner = x.shape[1:]
    # Each row begins one line after the row before it, and all of an expert hold one value.
    out = np.zeros((E, outer * 32 + inner), BF16)
    run_cpu(x, factors, as_strided(out, x.shape, (out.strides[0], 64, 2)), threads=2)
    written = (outer - 1) * 32 + inner
    wanted = expected(values.reshape(E, 1), factors, BF16)
    assert_same_bits(out[:, :written], np.repeat(wanted, written, axis=1))
    assert not out[:, written:].any()


@pytest.mark.parametrize("transpose", [False, True])
def test_offsets_beyond_32_bits(tmp_path, transpose):
    """A sparse file holds the tensors: 4 GiB from row to row, then from expert to expert."""
    far, shape = (1 << 32) + 64, (3, 2, 40)
    x_strides, out_strides = (1 << 33, far, 4), ((160, far, 4) if not transpose else (160, 4, far // 16))
    source = np.memmap(tmp_path / "x", np.uint8, "w+", shape=(1 << 35,))
    target = np.memmap(tmp_path / "out", np.uint8, "w+", shape=(1 << 35,))
    x = as_strided(source[:4].view(FP32), shape, x_strides)
    out = as_strided(target[:4].view(FP32), shape, out_strides)
    x[...] = random_codes(np.random.default_rng(4), shape, FP32)
    run_cpu(x, FACTORS[3:6], out, threads=2)
    assert_same_bits(np.array(out), expected(np.array(x), FACTORS[3:6], FP32))
