"""More elements than 32 bits count, and offsets beyond them, in little memory: rows overlap, or lie far apart."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from support.raw_kernels import run_cpu
from support.rounding import BF16, FACTORS, FP32, assert_same_bits, expected, random_codes

E, R, C = 2, 1 << 16, 1 << 15
assert E * R * C == 1 << 32  # no elements at all, to one who counts with 32 bits


@pytest.mark.parametrize("factors", [None, FACTORS[[0, 4]]], ids=["plain", "scaled"])
@pytest.mark.parametrize("transpose", [False, True])
def test_two_to_the_32_elements(transpose, factors):
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
