"""Buckets on a GPU: ordered by streams alone, within two buffers, and the example between two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.refit import WeightStream
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import assert_same_stream, in_order, per_expert
from support.synchronisation import no_synchronisation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16, FP32 = torch.bfloat16, torch.float32
E, H, I = 6, 10, 7  # noqa: E741
ADAPTER = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None)
EXAMPLE = Path(__file__).parents[2] / "examples" / "refit" / "trainer_and_engine.py"


def native_on_gpu(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.cuda() for name, t in nemo_from_hf(random_hf_state_dict(layers=3, dtype=dtype)).items()}


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_buckets_that_are_read_late_on_another_stream(experts: str, dtype: torch.dtype) -> None:
    native = native_on_gpu(dtype)
    stream = WeightStream(ADAPTER, native, dtype=BF16, experts=experts, bucket_bytes=3000)  # type: ignore[arg-type]
    late, found = torch.cuda.Stream(), []
    for bucket in stream.buckets():
        late.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(late):
            torch.cuda._sleep(3_000_000)
            found += [(name, tensor.clone()) for name, tensor in bucket.tensors()]
        bucket.done_on(late)
    torch.cuda.synchronize()
    expected = {name: t.to(BF16) for name, t in in_order({n: t.cpu() for n, t in native.items()}, layers=3).items()}
    assert_same_stream(found, per_expert(expected) if experts == "per-expert" else expected.items())


def test_a_pass_never_waits_for_the_device() -> None:
    stream = WeightStream(ADAPTER, native_on_gpu(FP32), dtype=BF16, bucket_bytes=3000)
    for _ in stream.buckets():  # compiles the kernel, which does wait
        pass
    with no_synchronisation():
        for _ in stream.buckets():
            pass


def test_a_pass_takes_two_buffers_of_memory() -> None:
    H, I = 512, 192  # noqa: E741
    shapes = {"gate_and_up_projs": (E, H, 2 * I), "down_projs": (E, I, H)}
    state = {
        f"model.layers.{layer}.moe.experts.{part}": torch.ones(shape, device="cuda", dtype=BF16)
        for layer in range(8)
        for part, shape in shapes.items()
    }
    largest = E * 2 * I * H * 2
    stream = WeightStream(Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None), state, bucket_bytes=largest)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in stream.buckets():
        pass
    assert largest < torch.cuda.max_memory_allocated() - before <= 2 * largest


def test_the_example_over_cuda_ipc() -> None:
    command = [sys.executable, EXAMPLE, "--transport", "ipc", "--device", "cuda"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bits equal") == 2
