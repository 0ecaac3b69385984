"""Every bf16 and fp16 value, and fp32 values around every kind of tie, times every factor, into every dtype."""

import numpy as np
import pytest

from gemma4_moe import kernels
from support.raw_kernels import KERNELS
from support.rounding import BF16, FACTORS, FORMATS, FP16, FP32, assert_same_bits, codes, expected, rounded


def every_value(dtype):
    """All codes of a 16-bit dtype as [1, 128, 512]; of fp32, those near the ties of each narrower format."""
    if dtype != FP32:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(1, 128, 512)
    exponents = np.arange(512, dtype=np.uint32) << 23  # sign and exponent
    ties = [base + delta for shift in (12, 15) for base in (1 << shift, 3 << shift) for delta in (-1, 0, 1)]
    mantissas = np.array([0, 1, 0x7FFFFF, 0x7FF000, 0x7FC000, *ties], np.int64).astype(np.uint32)
    grid = exponents[:, None] | mantissas[None, :]
    subnormals = np.arange(1 << 14, dtype=np.uint32)
    flat = np.concatenate([grid.ravel(), subnormals, subnormals | np.uint32(1 << 31)])
    return flat[: len(flat) // 512 * 512].view(FP32).reshape(1, -1, 512)


@pytest.mark.parametrize("factors", [FACTORS, None], ids=["scaled", "plain"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", FORMATS, ids=str)
@pytest.mark.parametrize("source", FORMATS, ids=str)
def test_every_value_is_rounded_once(source, target, name, factors):
    values = every_value(source)
    x = values if factors is None else np.broadcast_to(values, (len(factors), *values.shape[1:]))
    for view in (x, x.swapaxes(1, 2)) if factors is None else (x.swapaxes(1, 2),):
        out = np.empty(view.shape, target)
        KERNELS[name](view, factors, out)
        assert_same_bits(out, expected(view, factors, target))


@pytest.mark.parametrize(("target", "rate"), [(BF16, 2**-17), (FP16, 2**-14)], ids=str)
def test_an_fp32_factor_costs_one_last_place_at_most_and_seldom(target, rate):
    """Compared with exact products: those of 16 and 24 bits fit fp64."""
    draw = np.random.default_rng(0)
    x = draw.uniform(0.5, 1.0, (1, 1000, 1024)).astype(target)
    factor = draw.uniform(0.25, 2.0, 1).astype(FP32)
    out = np.empty(x.shape, target)
    KERNELS["numpy"](x, factor, out)
    right = rounded(x.astype(np.float64) * np.float64(factor), target).astype(target)
    assert np.abs(codes(out).astype(int) - codes(right).astype(int)).max() <= 1
    assert (codes(out) != codes(right)).mean() < 8 * rate


def test_the_formula_agrees_with_ml_dtypes_where_that_rounds_too():
    x = every_value(FP32)
    finite = np.isfinite(x)
    for target in (BF16, FP16):
        with np.errstate(over="ignore", invalid="ignore"):
            cast = x.astype(target)
        assert_same_bits(expected(x, None, target)[finite], cast[finite])


def test_arithmetic_does_not_depend_on_the_thread_that_calls():
    torch = pytest.importorskip("torch")
    x = np.full((3, 40, 40), 1e-39, np.float32)
    factors = np.array([1.5, 0.3, 2.0], np.float32)
    assert torch.set_flush_denormal(True)
    try:
        found = kernels.transpose_scale_cast(x, scale=factors, kernel="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(found, expected(x, factors, FP32).swapaxes(1, 2))
