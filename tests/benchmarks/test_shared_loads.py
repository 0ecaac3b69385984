"""The benchmark of shared reads, tried with few experts on two gloo ranks."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks/shared_loads.py"


def test_each_byte_is_read_once_where_reads_are_shared(tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    small = ["--layers", "1", "--experts", "2", "--device", "cpu"]
    done = subprocess.run([*ranks, PROGRAM, tmp_path, *small], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    read = {(placement, reads): float(share) for placement, _, reads, _, _, share in rows[2:]}
    assert len(read) == 8
    assert all(0.99 < share < 1.001 for (_, reads), share in read.items() if reads == "shared")
    assert read["replicas", "alone"] > 1.99
    assert list(tmp_path.iterdir()) == []
