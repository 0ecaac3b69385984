"""What every test may rely on: no network, whatever the environment says; and what those of several files share."""

import os

import pytest

from support.checkpoints import write_checkpoint
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def hf():
    return random_hf_state_dict()


@pytest.fixture
def nemo(hf):
    return nemo_from_hf(hf)


@pytest.fixture
def source(tmp_path):
    """An hf checkpoint of two weight files; with `small_blocks`, each makes several blocks."""
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=2, E=6, H=40, I=24))


@pytest.fixture
def small_blocks(monkeypatch):
    """Convert and journal by blocks of two pages, so that a small model has several of them."""
    monkeypatch.setattr("gemma4_moe.converter.blocks.BLOCK_BYTES", 8192)
    monkeypatch.setattr("gemma4_moe.target.journal.FLUSH_BYTES", 8192)
