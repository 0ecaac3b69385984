"""Transports: what arrives in another process, or on other ranks, is the stream, bit for bit."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from distributed.placement_checks import shard
from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream, broadcasting, ipc
from gemma4_moe.refit.vllm_source import vllm_source
from support import ranks
from support.streams import ADAPTER, LARGEST, assert_same_stream, expected_stream, nemo_state

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def described(pairs: Any) -> list[tuple[str, str, tuple[int, ...], list[int]]]:
    return [(name, str(t.dtype), tuple(t.shape), t.view(torch.uint8).tolist()) for name, t in pairs]


def read_twice(connection: Connection) -> None:
    for _ in range(2):
        connection.send(described(ipc.receive(connection)))


def test_another_process_reads_the_buckets_themselves() -> None:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=read_twice, args=(there,), daemon=True)
    process.start()
    nemo = nemo_state()
    stream = WeightStream(ADAPTER, nemo, bucket_bytes=LARGEST)
    for _ in range(2):
        ipc.send(stream, here)
        assert here.recv() == described(expected_stream(nemo))
        for tensor in nemo.values():
            tensor.neg_()
    process.join(60)
    assert process.exitcode == 0


def test_receiver_ranks_get_the_buckets() -> None:
    ranks.run(3, check_broadcast)


def check_broadcast() -> None:
    """Two trainer ranks share the experts; the second of them feeds a receiver."""
    rank = dist.get_rank()
    trainers = DeviceMesh("cpu", [0, 1])
    group = dist.new_group([1, 2])
    nemo = nemo_state()
    if rank < 2:
        stream = WeightStream(ADAPTER, shard(nemo, trainers, (Shard(0),)), bucket_bytes=LARGEST, dst=1)
        for _ in range(2):
            broadcasting.send(stream, group)
        return
    for _ in range(2):
        found = [(name, tensor.clone()) for name, tensor in broadcasting.receive(1, group=group)]
        assert_same_stream(found, expected_stream(nemo))


@pytest.mark.parametrize("arguments", [{"dtype": None}, {"dst": 0, "dtype": "bfloat16"}])
def test_a_stream_that_vllm_can_not_take_is_refused(arguments: dict[str, Any]) -> None:
    state = nemo_state()
    name = "model.language_model.layers.1.layer_scalar"
    with pytest.raises(UsageError, match=r"(?s)several dtypes.*layer_scalar.*set dtype|for one rank"):
        vllm_source(WeightStream(ADAPTER, state | {name: state[name].float()}, **arguments))


def test_a_stream_is_what_sglang_loads() -> None:
    """SGLang's `load_weights` takes an iterable of pairs, on every refit anew."""

    class Engine:
        def load_weights(self, weights: Any) -> None:
            self.weights = {name: tensor.clone() for name, tensor in weights}

    nemo = nemo_state()
    stream, engine = WeightStream(ADAPTER, nemo), Engine()
    for _ in range(2):
        engine.load_weights(stream)
        assert_same_stream(engine.weights.items(), expected_stream(nemo))
