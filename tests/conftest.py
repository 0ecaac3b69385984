"""What every test may rely on: no network, whatever the environment says; and what those of several files share."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash and journal by pieces of two pages, so that a small model has several of them."""
    monkeypatch.setattr("gemma4_moe.checkpoints.hashing.CHUNK_BYTES", 8192)
    monkeypatch.setattr("gemma4_moe.ledger.FLUSH_BYTES", 8192)
