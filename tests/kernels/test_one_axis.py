"""Casts and scalings of arrays with one axis or none, as the converter makes them for norms and scalars."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma4_moe.kernels import available, scale_cast

KERNELS = [name for name in ("numpy", "cpu") if available()[name].usable]


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_axis_and_none(kernel: str) -> None:
    x = np.random.default_rng(3).normal(size=11).astype(np.float32)
    scale = np.linspace(-1.5, 2.25, 11, dtype=np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert np.array_equal(scale_cast(x, dtype=dtype, kernel=kernel), x.astype(dtype))
        assert np.array_equal(scale_cast(x, scale=scale, dtype=dtype, kernel=kernel), (x * scale).astype(dtype))
        assert scale_cast(x[4:5].reshape(()), dtype=dtype, kernel=kernel) == x[4].astype(dtype)
