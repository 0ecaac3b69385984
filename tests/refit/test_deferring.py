"""A consumer that keeps the arguments of every load until a module is complete, as vLLM's layer-wise reload does."""

import re

import pytest
import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream
from support.streams import ADAPTER, LARGEST, E, H, I, assert_same_stream, expected_stream, nemo_state

ATTENTION = {"q_proj": (H + 2, H), "k_proj": (H - 5, H), "v_proj": (H - 5, H)}


def state():
    """Native tensors of three layers, with attention."""
    generator = torch.Generator().manual_seed(5)
    nemo = nemo_state()
    for layer in range(3):
        for part, shape in ATTENTION.items():
            name = f"model.language_model.layers.{layer}.self_attn.{part}.weight"
            nemo[name] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return nemo


class Deferring:
    """Copies the tensors of a module once it has all of them: a layer's experts, or its q, k and v projections."""

    def __init__(self, experts):
        expert_tensors = 2 if experts == "fused" else 3 * E
        self.wanted = {"experts": expert_tensors, "self_attn": len(ATTENTION)}
        self.pending = {}
        self.loaded = {}

    def load(self, pairs):
        for name, tensor in pairs:
            match = re.match(r"(.*\.(experts|self_attn))\.", name)
            module, count = (match[1], self.wanted[match[2]]) if match else (name, 1)
            self.pending.setdefault(module, []).append((name, tensor))
            if len(self.pending[module]) == count:
                self.loaded |= {name: tensor.clone() for name, tensor in self.pending.pop(module)}


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("native", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bucket_bytes", "oversize", "buffers"),
    [
        (LARGEST, "error", None),
        (LARGEST, "error", 3),
        (LARGEST - 1, "own", None),
        (700, "own", None),
        (2**20, "error", 2),
    ],
)
def test_it_gets_the_right_bits(experts, native, bucket_bytes, oversize, buffers):
    nemo = {name: tensor.to(native) for name, tensor in state().items()}
    if experts == "per-expert" and buffers == 3:  # a layer's experts take 512 aligned bytes each, in buckets of 2048
        buffers = 6
    arguments = {"experts": experts, "dtype": "bfloat16", "bucket_bytes": bucket_bytes, "oversize": oversize}
    stream = WeightStream(nemo, ADAPTER, buffers=buffers, **arguments)
    expected = expected_stream(nemo, experts=experts, dtype=torch.bfloat16)
    for _ in range(2):
        engine, count = Deferring(experts), 0
        for bucket in stream.buckets():
            engine.load(bucket.tensors(copy_up_to=0))
            count += 1
        assert count >= 3 or bucket_bytes == 2**20
        assert not engine.pending
        assert_same_stream([(name, engine.loaded[name]) for name, _ in expected], expected)


def test_too_few_buffers_are_an_error_and_no_wrong_bits():
    stream = WeightStream(state(), ADAPTER, experts="per-expert", bucket_bytes=2 * I * H, oversize="own", buffers=4)
    engine = Deferring("per-expert")
    first = r"layers\.0\.experts\.0\.down_proj"
    words = rf"(?s)still holds all 4 buffers.*{first}.*set buffers to more than 4"
    with pytest.raises(UsageError, match=words):
        engine.load(pair for bucket in stream.buckets() for pair in bucket.tensors(copy_up_to=0))
    expected = dict(expected_stream(state(), experts="per-expert"))
    kept = [pair for pairs in engine.pending.values() for pair in pairs]
    assert_same_stream(kept, [(name, expected[name]) for name, _ in kept])
