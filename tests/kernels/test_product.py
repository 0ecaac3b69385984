"""`scale_add_cast`: the sum term after term, rounded once, with the same bits from every kernel."""

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma4_moe import kernels

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]
SHAPES = [(1, 1, 1, 1), (3, 4, 3, 32), (2, 5, 7, 31), (4, 9, 2, 70), (2, 3, 16, 129), (2, 67, 5, 64), (2, 300, 2, 700)]


def given(experts, rows, rank, columns, dtype=np.float32):
    rng = np.random.default_rng(rows * 100 + columns)
    x, left, right = (
        rng.standard_normal((experts, *shape), np.float32) for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    return x.astype(dtype), left, right, rng.uniform(0.3, 3, experts).astype(np.float32)


def in_order(x, left, right, scale):
    """fp32, term after term over the rank: each product and each sum is rounded."""
    total = np.zeros(x.shape, np.float32)
    for k in range(left.shape[2]):
        total = total + np.einsum("er,ec->erc", left[:, :, k], right[:, k])
    return x.astype(np.float32) * scale[:, None, None] + total


@pytest.mark.parametrize("kernel", ["cpu", "numpy"])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_taken_term_after_term_and_rounded_once(shape, source, target, kernel):
    x, left, right, scale = given(*shape, dtype=source)
    acts = np.arange(shape[0]) != 1
    expected = in_order(x, left, right, scale).astype(target)
    plain = kernels.scale_cast(x, scale=scale, dtype=target, kernel="numpy")
    expected[~acts] = plain[~acts]
    for exchanged in (False, True):
        out = np.empty(x.shape, target)
        if exchanged:
            out = np.empty((shape[0], shape[3], shape[1]), target).swapaxes(1, 2)
        kernels.scale_add_cast(x, left=left, right=right, acts=acts, scale=scale, out=out, kernel=kernel, threads=2)
        assert np.array_equal(np.ascontiguousarray(out).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("kernel", ["cpu", "numpy"])
def test_rows_of_larger_matrices_and_strided_values(kernel):
    x, left, right, scale = given(4, 12, 3, 40)
    whole = in_order(x, left, right, scale)
    out = np.zeros_like(whole)
    acts = np.ones(2, bool)
    kernels.scale_add_cast(
        x[1:3, 5:9],
        left=left[1:3, 5:9],
        right=right[1:3],
        acts=acts,
        scale=scale[1:3],
        out=out[1:3, 5:9],
        kernel=kernel,
    )
    assert np.array_equal(out[1:3, 5:9], whole[1:3, 5:9])
    out[1:3, 5:9] = 0
    assert not out.any()


def test_subnormal_sums_are_kept_whatever_the_threads_mode():
    x, left, right, scale = given(2, 7, 3, 40)
    right *= np.float32(1e-40)
    x *= np.float32(1e-40)
    expected = in_order(x, left, right, scale)
    out = np.empty_like(x)
    assert torch.set_flush_denormal(True)
    try:
        kernels.scale_add_cast(
            x, left=left, right=right, acts=np.ones(2, bool), scale=scale, out=out, kernel="cpu", threads=1
        )
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    assert 0 < np.abs(out).max() < np.finfo(np.float32).tiny


@pytest.mark.parametrize("kernel", ["cpu", "numpy"])
def test_nan_and_infinities_are_values_like_others(kernel):
    x, left, right, _ = given(1, 5, 3, 40)
    x[0, 0, 0], left[0, 1, 0], right[0, 2, 7] = np.nan, np.inf, np.nan
    out = np.empty_like(x)
    kernels.scale_add_cast(x, left=left, right=right, acts=np.ones(1, bool), out=out, kernel=kernel)
    assert np.isnan(out[0, 0, 0])
    assert not np.isfinite(out[0, 1]).any()
    assert np.isnan(out[0, :, 7]).all()
    assert np.isfinite(out[0, 2:, 8:]).all()
