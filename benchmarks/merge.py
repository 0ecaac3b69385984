"""Merge an adapter of all experts into real layers, beside the plain conversion of the same bytes.

    python benchmarks/merge.py [--directory DIR] [--layers 3] [--rank 16] [--pairs 5] [--rest 8] [--sparse]

The adapter is in NeMo's form, bf16: B of `down` is divided by its expert's scale where the target is hf. Runs are
interleaved pairs: each merge beside a conversion hf → nemo of its own, now before it and now after it, in processes of
their own, with the source dropped from the page cache before. Throughput is that of the target's bytes, by wall time
until all is on the device; memory is the process' peak resident size. With --sparse the base's experts are holes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from convert import OURS, Pair, measured, spread
from real_layers import E, H, I, write_source

from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.layout.lora import ADAPTER_PREFIX, LORA_ROWS
from gemma4_moe.target.file_layout import layout_header

MERGE = """
    import sys
    from gemma4_moe import merge
    merge(sys.argv[1], sys.argv[3], sys.argv[2], to=sys.argv[4], read_back=False)
"""


def write_adapter(directory: Path, layers: int, rank: int, sizes: tuple[int, int, int]) -> None:
    """Write a random adapter of all experts in NeMo's form."""
    own = dict(zip("EHI", sizes, strict=True)) | {"r": rank, "2I": 2 * sizes[2]}
    tensors = [
        (f"{ADAPTER_PREFIX}model.language_model.layers.{layer}.{row.nemo}", BFLOAT16, shape)
        for layer in range(layers)
        for row in LORA_ROWS
        for shape in [tuple(own[axis] for (axis,) in row.nemo_axes)]
    ]
    header, entries = layout_header(tensors)
    directory.mkdir()
    rng = np.random.default_rng(1)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(header)
        for entry in entries:
            values = rng.standard_normal(entry.nbytes // 2, np.float32) / 100
            file.write(values.astype(BFLOAT16.numpy()).tobytes())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "automodel_peft_config.json").write_text("{}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    options.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    options.add_argument("--layers", type=int, default=3, help="layers of 1.54 GB")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--pairs", type=int, default=5, help="pairs for each row")
    options.add_argument("--rest", type=float, default=8, help="seconds before each run")
    options.add_argument("--sparse", action="store_true", help="the base's experts are holes")
    options.add_argument("--sizes", type=int, nargs=3, default=(E, H, I), metavar=("E", "H", "I"))
    options.add_argument("--json", type=Path, help="write all figures there")
    given = options.parse_args()
    sizes = tuple(given.sizes)
    runs: dict[str, list[Pair]] = {"merge → hf": [], "merge → nemo": []}
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        directory = Path(name)
        base, target = directory / "base", directory / "target"
        write_source(base, given.layers, sizes, sparse=given.sparse)
        write_adapter(directory / "adapter", given.layers, given.rank, sizes)
        nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        for number in range(given.pairs):
            for row, pairs in runs.items():
                words = str(directory / "adapter"), row.split()[-1]
                plain = partial(measured, OURS, base, target, "direct", rest=given.rest)
                ours = partial(measured, MERGE, base, target, *words, rest=given.rest)
                done = [run() for run in ((plain, ours) if number % 2 else (ours, plain))]
                pairs.append(Pair(*(done if number % 2 else done[::-1])))
    report(runs, nbytes, given)


def report(runs: dict[str, list[Pair]], nbytes: int, given: argparse.Namespace) -> None:
    """Print the table, and write all figures where they are wanted."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}; {nbytes / 1e9:.2f} GB, "
        f"rank {given.rank}, {given.pairs} pairs"
    )
    print(f"{'':14} {'GB/s':>6} {'spread':>11} {'plain':>6} {'spread':>11} {'×':>6} {'spread':>11} {'peak RSS':>10}")
    for row, pairs in runs.items():
        ours = spread([nbytes / pair.ours.seconds / 1e9 for pair in pairs])
        plain = spread([nbytes / pair.copy.seconds / 1e9 for pair in pairs])
        ratios = spread([pair.copy.seconds / pair.ours.seconds for pair in pairs])
        print(f"{row:14} {ours} {plain} {ratios} {max(pair.ours.peak for pair in pairs) / 2**20:6.0f} MiB")
    if given.json is not None:
        given.json.write_text(json.dumps({"bytes": nbytes, "layers": given.layers, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
