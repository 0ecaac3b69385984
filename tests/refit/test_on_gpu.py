"""Buckets on a GPU: ordered by streams alone, and within two buffers."""

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.refit import WeightStream
from support.streams import ADAPTER, E, assert_same_stream, expected_stream, nemo_state
from support.synchronisation import no_synchronisation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16, FP32 = torch.bfloat16, torch.float32


def native_on_gpu(dtype):
    return {name: tensor.cuda() for name, tensor in nemo_state(dtype=dtype).items()}


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_buckets_that_are_read_late_on_another_stream(experts, dtype):
    stream = WeightStream(native_on_gpu(dtype), ADAPTER, dtype=BF16, experts=experts, bucket_bytes=3000)
    late, found = torch.cuda.Stream(), []
    for bucket in stream.buckets():
        late.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(late):
            torch.cuda._sleep(3_000_000)
            found += [(name, tensor.clone()) for name, tensor in bucket.tensors()]
        bucket.done_on(late)
    torch.cuda.synchronize()
    assert_same_stream(found, expected_stream(nemo_state(dtype=dtype), experts=experts, dtype=BF16))


def test_a_pass_never_waits_for_the_device():
    stream = WeightStream(native_on_gpu(FP32), ADAPTER, dtype=BF16, bucket_bytes=3000)
    for _ in stream.buckets():  # compiles the kernel, which does wait
        pass
    with no_synchronisation():
        for _ in stream.buckets():
            pass


def test_a_pass_takes_two_buffers_of_memory():
    H, I = 512, 192  # noqa: E741
    shapes = {"gate_and_up_projs": (E, H, 2 * I), "down_projs": (E, I, H)}
    state = {
        f"model.layers.{layer}.moe.experts.{part}": torch.ones(shape, device="cuda", dtype=BF16)
        for layer in range(8)
        for part, shape in shapes.items()
    }
    largest = E * 2 * I * H * 2
    stream = WeightStream(state, Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None), bucket_bytes=largest)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in stream.buckets():
        pass
    assert largest < torch.cuda.max_memory_allocated() - before <= 2 * largest
