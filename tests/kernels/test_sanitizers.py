"""The C++ under the address and undefined-behaviour sanitizers: random moves on buffers with no byte to spare."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cpp" / "tests" / "run.sh"
SANITIZERS = "address,undefined"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def links(directory: Path, *options: str) -> bool:
    program = directory / "empty.cpp"
    program.write_text("int main() {}\n")
    command = [*COMPILER, *options, str(program), "-o", str(directory / "empty")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_no_access_outside_the_buffers_and_nothing_undefined(tmp_path):
    assert links(tmp_path), "no working C++ compiler"
    if not links(tmp_path, f"-fsanitize={SANITIZERS}"):
        pytest.skip(f"{COMPILER[0]} has no libraries for -fsanitize={SANITIZERS}")
    done = subprocess.run(["sh", str(SCRIPT), SANITIZERS], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("plain right")
