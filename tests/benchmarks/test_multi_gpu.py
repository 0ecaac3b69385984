"""The benchmark for several GPUs, tried with small layers on two gloo ranks; a bit that differs must end it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "multi_gpu.py"
SMALL = ["--device", "cpu", "--experts", "4", "--hidden", "64", "--intermediate", "24", "--repeats", "1", "--no-peer"]


def run(directory, *program):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, *program, *SMALL, "--directory", directory, "--json", directory / "figures.json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_every_section_compares_its_bits_and_leaves_nothing(tmp_path):
    done = run(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    equal = {(row["table"], row["ranks"], row["contender"]): row["tensors equal"] for row in rows}
    native_moe, hf_experts, hf_all = 2 * 4, 2 * 3, 2 * 14  # tensors of two layers
    for ranks in ("ep 2", "ep_shard 2 × ep 1"):
        assert equal["Loading", ranks, "ours, load_hf"] == native_moe
        assert equal["Loading", ranks, "ours, from_hf of lazy slices"] == native_moe
        assert equal["Gathering", ranks, "ours, gather=True"] == hf_experts
        assert equal["Gathering", ranks, "ours, gather=False"] == hf_experts
        assert equal["Streaming", ranks, "ours, buckets"] == hf_all
    assert equal["NeMo's Checkpointer", "ep 2", "ours, load"] > hf_all
    collectives = {row["contender"]: row["collectives"] for row in rows if row["table"] == "Gathering"}
    assert collectives["ours, gather=False"] == 0
    assert collectives["ours, gather=True"] > 0
    shares = {(row["ranks"], row["contender"]): row["share of MoE bytes"] for row in rows if row["table"] == "Loading"}
    assert shares["ep 2", "ours, load_hf"] == "0.500"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


#: What flips one bit on the second rank, and the tensor that must be named.
BROKEN = {
    "load_hf": (
        "multi_gpu.load_hf = after(multi_gpu.load_hf, lambda given, _: next(iter(given[0].values())))",
        "layers.0.moe.experts.gate_and_up_projs",
    ),
    "buckets": (
        "Bucket = buckets.Bucket\nBucket.tensors = after(Bucket.tensors, lambda _, result: result[0][1])",
        "layers.0.experts.down_proj",
    ),
}


@pytest.mark.parametrize("place", BROKEN)
def test_one_bit_that_differs_on_one_rank_ends_the_program(place, tmp_path):
    patch, tensor = BROKEN[place]
    driver = tmp_path / "broken.py"
    driver.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        sys.modules["nemo_automodel"] = None  # quicker
        import multi_gpu
        from gemma4_moe.distributed.placements import as_bytes, local_of
        from gemma4_moe.refit import buckets

        def after(function, chosen):
            def broken(*given, **options):
                result = function(*given, **options)
                tensor = chosen(given, result)
                if os.environ["RANK"] == "1":
                    raw = as_bytes(local_of(tensor))
                    raw[0] ^= 1
                return result
            return broken
        """)
        + patch
        + "\nmulti_gpu.main()\n"
    )
    done = run(tmp_path, driver)
    assert done.returncode != 0
    assert "AssertionError: {1: ['model.language_model." + tensor + "'" in done.stderr
