"""The worked example: two processes, both transports, equal bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "refit" / "trainer_and_engine.py"


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_the_example_ends_with_equal_bits(transport: str) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLE, "--transport", transport], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bits equal") == 2
