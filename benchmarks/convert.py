"""Convert a checkpoint of real layers, beside `cp` + fsync of the same bytes and beside what a person would write.

    python benchmarks/convert.py [--directory DIR] [--layers 3] [--pairs 5] [--rest 8] [--naive] [--json FILE]

Runs are interleaved pairs: in each round every row of the table runs beside a copy of its own, now before it and now
after it, each in a process of its own, with the source dropped from the page cache before it. A rest before each lets a
disk that gives more after one give the same to all. Throughput is that of the target's bytes, by wall time until all is
on the device; memory is the process' peak resident size. The peer is NeMo AutoModel's adapter, between safetensors'
`load_file` and `save_file`; it computes for long, which is a rest too, so its rounds come last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from real_layers import write_source

from gemma4_moe import convert

OURS = """
    import sys
    from gemma4_moe import convert
    convert(sys.argv[1], sys.argv[2], read_back="read-back" in sys.argv, buffered="buffered" in sys.argv)
"""

#: What a process says last: the most memory that it has ever held, which its parent can't see apart from its own.
PEAK = """
    import re
    from pathlib import Path
    print(re.search(r"VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
"""

NAIVE = """
    import os, sys
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    from nemo_automodel.components.models.gemma4_moe.state_dict_adapter import Gemma4MoEStateDictAdapter
    from safetensors.torch import load_file, save_file
    state = {}
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        state |= load_file(path)
    sizes = SimpleNamespace(n_routed_experts=128)
    adapter = Gemma4MoEStateDictAdapter(SimpleNamespace(), sizes, SimpleNamespace(), dtype=torch.bfloat16)
    native = adapter.from_hf(state)
    out = Path(sys.argv[2])
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in native.items()}, out / "model.safetensors")
    with (out / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
"""

COPY = """
    import os, subprocess, sys
    from pathlib import Path
    subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
    for path in [*Path(sys.argv[2]).iterdir(), Path(sys.argv[2])]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
"""


class Run(NamedTuple):
    """How long a process took, in seconds, and its peak resident size, in bytes."""

    seconds: float
    peak: int


#: A program, its source, and its words.
Row = tuple[str, Path, tuple[str, ...]]


class Pair(NamedTuple):
    """A copy, and what is compared with it."""

    copy: Run
    ours: Run


def measured(program: str, source: Path, target: Path, *words: str, rest: float = 0) -> Run:
    """Return the seconds and the peak resident bytes of a program that makes `target` from `source`, after a rest."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    time.sleep(rest)
    for path in source.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    text = textwrap.dedent(program) + textwrap.dedent(PEAK)
    done = subprocess.run([sys.executable, "-c", text, source, target, *words], stdout=subprocess.PIPE, check=True)
    return Run(time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024)


def rows(directory: Path) -> dict[str, Row]:
    """Return each row of ours."""
    hf, nemo = directory / "hf", directory / "nemo"
    return {
        "hf → nemo": (OURS, hf, ("direct",)),
        "hf → nemo, read back": (OURS, hf, ("read-back",)),
        "nemo → hf": (OURS, nemo, ("direct",)),
        "nemo → hf, read back": (OURS, nemo, ("read-back",)),
        "hf → nemo, --buffered": (OURS, hf, ("buffered",)),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    options.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    options.add_argument("--layers", type=int, default=3, help="layers of 1.54 GB")
    options.add_argument("--pairs", type=int, default=5, help="pairs for each row")
    options.add_argument("--rest", type=float, default=8, help="seconds before each run")
    options.add_argument("--naive", action="store_true", help="the peer too; needs three times the bytes in memory")
    options.add_argument("--json", type=Path, help="write all figures there")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        directory = Path(name)
        write_source(directory / "hf", given.layers)
        convert(directory / "hf", directory / "nemo")
        nbytes = sum(path.stat().st_size for path in (directory / "nemo").glob("*.safetensors"))
        tables = [rows(directory)]
        if given.naive:
            tables.append({"load_file, the peer's from_hf, save_file": (NAIVE, directory / "hf", ())})
        runs: dict[str, list[Pair]] = {row: [] for table in tables for row in table}
        for table in tables:
            for number in range(given.pairs):
                for row, (program, source, words) in table.items():
                    ours = partial(measured, program, source, directory / "target", *words, rest=given.rest)
                    copy = partial(measured, COPY, source, directory / "target", rest=given.rest)
                    pair = [run() for run in ((copy, ours) if number % 2 else (ours, copy))]
                    runs[row].append(Pair(*(pair if number % 2 else pair[::-1])))
    report(runs, nbytes, given)


def report(runs: dict[str, list[Pair]], nbytes: int, given: argparse.Namespace) -> None:
    """Print the table, and write all figures where they are wanted."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}; "
        f"{nbytes / 1e9:.2f} GB, {given.pairs} pairs"
    )
    print(f"{'':42} {'GB/s':>6} {'spread':>11} {'cp':>6} {'spread':>11} {'× cp':>6} {'spread':>11} {'peak RSS':>10}")
    for row, pairs in runs.items():
        ours = spread([nbytes / pair.ours.seconds / 1e9 for pair in pairs])
        copies = spread([nbytes / pair.copy.seconds / 1e9 for pair in pairs])
        ratios = spread([pair.copy.seconds / pair.ours.seconds for pair in pairs])
        print(f"{row:42} {ours} {copies} {ratios} {max(pair.ours.peak for pair in pairs) / 2**20:6.0f} MiB")
    if given.json is not None:
        given.json.write_text(json.dumps({"bytes": nbytes, "layers": given.layers, "runs": runs}, indent=1))


def spread(values: list[float]) -> str:
    """Return a median, and the least and the largest value."""
    return f"{statistics.median(values):6.2f} {f'{min(values):.2f}–{max(values):.2f}':>11}"


if __name__ == "__main__":
    main()
