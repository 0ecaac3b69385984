"""The state dict that the adapter's tests convert, in both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    import torch


@pytest.fixture
def hf() -> dict[str, torch.Tensor]:
    return random_hf_state_dict()


@pytest.fixture
def nemo(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return nemo_from_hf(hf)
