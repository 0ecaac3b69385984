"""The benchmark of merging, tried with small layers: both rows are measured, and nothing is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "merge.py"


@pytest.mark.parametrize("more", [(), ("--sparse",)])
def test_each_merge_is_measured_beside_a_plain_conversion(more, tmp_path):
    words = ["--sizes", "4", "48", "20", "--rank", "3", "--layers", "2", "--pairs", "1", "--rest", "0", *more]
    where = ["--directory", tmp_path, "--json", tmp_path / "figures.json"]
    done = subprocess.run([sys.executable, PROGRAM, *words, *where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {row: len(pairs) for row, pairs in found["runs"].items()} == {"merge → hf": 1, "merge → nemo": 1}
    assert "plain" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
