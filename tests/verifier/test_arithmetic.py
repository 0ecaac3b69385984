import ml_dtypes
import numpy as np
import pytest
import torch

from gemma4_moe.layout.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32
from gemma4_moe.verifier.arithmetic import element_bits, reference, widen

TORCH = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}
NUMPY = {BFLOAT16: ml_dtypes.bfloat16, FLOAT16: np.float16, FLOAT32: np.float32}
QUIET_NAN = {BFLOAT16: 0x7FC0, FLOAT16: 0x7E00, FLOAT32: 0x7FC00000}
LARGEST, TINY = 3.4028234663852886e38, 2.0**-149
SCALES = [
    float(np.float32(0.7)), 1.15625, 0.9999999403953552, 0.0, -0.0, -1.5, 2.0**-130, TINY, 2.0**120, LARGEST, np.inf,
    -np.inf, np.nan,
]  # fmt: skip

EVERY_16_BITS = np.arange(2**16, dtype=np.uint16)


def some_32_bits():
    """Random bit patterns, and patterns that are ties of bfloat16 or float16, or one step beside a tie."""
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32)
    ties = [(random[:20_000] >> n << n) + np.uint32(2 ** (n - 1) + step) for n in (13, 16) for step in (-1, 0, 1)]
    subnormal_fp16 = (random[:20_000] & 0x807FFFFF) | (np.arange(20_000, dtype=np.uint32) % 16 + 100 << 23)
    return np.concatenate([random, *ties, subnormal_fp16, np.uint32([0, 2**31, 0x7F800000, 0xFF800000, 0x7F800001])])


def by_torch(bits, source, target, scale):
    x = torch.from_numpy(bits.copy()).view(TORCH[source])
    result = (x.to(torch.float32) * torch.tensor(scale, dtype=torch.float32)).to(TORCH[target])
    return result.view(torch.uint16 if target.bits == 16 else torch.uint32).numpy()


def by_numpy(bits, source, target, scale):
    with np.errstate(all="ignore"):
        result = (bits.view(NUMPY[source]).astype(np.float32) * np.float32(scale)).astype(NUMPY[target])
    return result.view(element_bits(target))


@pytest.mark.parametrize("target", NUMPY, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", NUMPY, ids=lambda dtype: dtype.name)
def test_rounding_is_that_of_torch_and_of_ml_dtypes(source, target):
    bits = EVERY_16_BITS if source.bits == 16 else some_32_bits()
    nan_sign = (bits >> source.bits - 1).astype(np.uint64) << target.bits - 1
    for scale in SCALES:
        found = reference(bits, source, target, scale)
        assert found.dtype == element_bits(target)
        for other in (by_torch, by_numpy):
            expected = other(bits, source, target, scale)
            nan = np.isnan(expected.view(NUMPY[target]))
            assert np.array_equal(found[~nan], expected[~nan]), (other, scale)
            assert np.array_equal(found[nan], nan_sign[nan] | QUIET_NAN[target]), (other, scale)


@pytest.mark.parametrize("dtype", NUMPY, ids=lambda dtype: dtype.name)
def test_bits_are_kept_where_dtype_stays_and_the_scale_is_one(dtype):
    bits = EVERY_16_BITS if dtype.bits == 16 else some_32_bits()
    assert np.array_equal(reference(bits, dtype, dtype), bits)
    assert np.array_equal(reference(bits, dtype, dtype, 1.0), bits)


def test_a_nan_does_not_survive_a_scale_of_one_where_the_dtype_changes():
    bits = np.array([0x7F81, 0xFFFF, 0x7FC1], np.uint16)
    assert reference(bits, BFLOAT16, FLOAT32, 1.0).tolist() == [0x7FC00000, 0xFFC00000, 0x7FC00000]


def test_float8_is_widened_as_torch_widens_it():
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    assert np.array_equal(widen(bits, FLOAT8_E4M3), expected, equal_nan=True)
    numbers = bits[~np.isnan(expected)]
    rounded = reference(numbers, FLOAT8_E4M3, BFLOAT16)
    assert np.array_equal(widen(rounded, BFLOAT16), expected[~np.isnan(expected)])
