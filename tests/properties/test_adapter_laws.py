"""Each law of the adapter, over drawn models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from properties.adapter_laws import LAWS, Model

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
PREFIXES = st.one_of(
    st.sampled_from(
        ["model.language_model.", "model.", "language_model.", "", "base_model.model.model.", "model.decoder."]
    ),
    st.text(min_size=1, max_size=20).filter(lambda text: "layers." not in text).map(lambda text: text + "."),
)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7)).filter(
    lambda sizes: len({*sizes, 2 * sizes[2]}) == 4
)
LAYERS = st.lists(st.integers(0, 999_999_999), min_size=1, max_size=3, unique=True)


@st.composite
def models(draw: st.DrawFn) -> Model:
    return Model(
        *draw(SIZES),
        file=draw(DTYPES),
        scale=draw(DTYPES),
        target=draw(DTYPES),
        prefix=draw(PREFIXES),
        layers=tuple(draw(LAYERS)),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=models())
def test_law(law: Callable[[Model], None], model: Model) -> None:
    law(model)
