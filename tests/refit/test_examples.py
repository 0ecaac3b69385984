"""The worked example: two processes, both transports, on the CPU and on a GPU, equal bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "refit" / "trainer_and_engine.py"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "options", [["broadcast"], ["ipc"], pytest.param(["ipc", "--device", "cuda"], marks=NO_GPU)], ids=" ".join
)
def test_the_example_ends_with_equal_bits(options: list[str]) -> None:
    command = [sys.executable, EXAMPLE, "--transport", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bits equal") == 2
