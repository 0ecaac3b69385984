"""Transports and engines: what arrives in another process, on other ranks or in an engine is the stream, bit by bit."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from distributed.placement_checks import shard
from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model, logits
from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream, broadcasting, ipc
from gemma4_moe.refit.vllm_source import vllm_source
from support import ranks
from support.streams import ADAPTER, LARGEST, assert_same_stream, expected_stream, nemo_state

EXAMPLE = Path(__file__).parents[2] / "examples" / "refit" / "trainer_and_engine.py"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def described(pairs):
    return [(name, str(t.dtype), tuple(t.shape), t.view(torch.uint8).tolist()) for name, t in pairs]


def read_twice(connection):
    for _ in range(2):
        with ipc.receive(connection, copy_up_to=0) as tensors:
            found = described(tensors)
        connection.send(found)


def test_another_process_reads_the_buckets_themselves():
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=read_twice, args=(there,), daemon=True)
    process.start()
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST)
    for _ in range(2):
        ipc.send(stream, here)
        assert here.recv() == described(expected_stream(nemo))
        for tensor in nemo.values():
            tensor.neg_()
    process.join(60)
    assert process.exitcode == 0


def test_receiver_ranks_get_the_buckets():
    ranks.run(3, check_broadcast)


def check_broadcast():
    """Two trainer ranks share the experts; the second of them feeds a receiver."""
    rank = dist.get_rank()
    trainers = DeviceMesh("cpu", [0, 1])
    group = dist.new_group([1, 2])
    nemo = nemo_state()
    if rank < 2:
        stream = WeightStream(shard(nemo, trainers, (Shard(0),)), ADAPTER, bucket_bytes=LARGEST, dst=1)
        for _ in range(2):
            broadcasting.send(stream, group)
        return
    for _ in range(2):
        with broadcasting.receive(1, copy_up_to=0, group=group) as tensors:
            found = [(name, tensor.clone()) for name, tensor in tensors]
        assert_same_stream(found, expected_stream(nemo))


@pytest.mark.parametrize("arguments", [{"dtype": None}, {"dst": 0, "dtype": "bfloat16"}])
def test_a_stream_that_vllm_can_not_take_is_refused(arguments):
    state = nemo_state()
    name = "model.language_model.layers.1.layer_scalar"
    with pytest.raises(UsageError, match=r"(?s)several dtypes.*layer_scalar.*set dtype|for one rank"):
        vllm_source(WeightStream(state | {name: state[name].float()}, ADAPTER, **arguments))


def test_a_stream_is_what_sglang_loads():
    """SGLang's `load_weights` takes an iterable of pairs, on every refit anew."""

    class Engine:
        def load_weights(self, weights):
            self.weights = {name: tensor.clone() for name, tensor in weights}

    nemo = nemo_state()
    stream, engine = WeightStream(nemo, ADAPTER), Engine()
    for _ in range(2):
        engine.load_weights(stream)
        assert_same_stream(engine.weights.items(), expected_stream(nemo))


@pytest.mark.parametrize(
    "options", [["broadcast"], ["ipc"], pytest.param(["ipc", "--device", "cuda"], marks=NO_GPU)], ids=" ".join
)
def test_the_example_ends_with_equal_bits(options):
    command = [sys.executable, EXAMPLE, "--transport", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bits equal") == 2


def native(model):
    adapter = Gemma4MoEStateDictAdapter(model.config, None, None)
    return adapter.from_hf({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}), adapter


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_transformers_loads_a_stream_strictly(kind):
    trained, engine = build_model(kind, seed=1), build_model(kind, seed=2)
    sent = dict(WeightStream(*native(trained)))
    tied = next(name for name in sent if name.endswith("embed_tokens.weight"))
    engine.load_state_dict(sent | {"lm_head.weight": sent[tied]}, strict=True)
    torch.testing.assert_close(logits(engine), logits(trained), rtol=0, atol=1e-4)


def test_the_loop_of_nemo_rl_sends_the_same():
    state, adapter = native(build_model())
    sent = []
    for fqn, tensor in state.items():
        pairs = adapter.convert_single_tensor_to_hf(
            fqn, tensor, exclude_key_regex=r".*_extra_state.*", quantization=False
        )
        sent += [(name, converted.to(torch.bfloat16).contiguous()) for name, converted in pairs]
    stream = WeightStream(state, adapter, dtype=torch.bfloat16)
    order = {planned.name: place for place, planned in enumerate(stream.plan())}
    assert_same_stream(stream, sorted(sent, key=lambda pair: order[pair[0]]))
