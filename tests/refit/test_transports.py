"""Transports: what arrives in another process, or on other ranks, is the stream, bit for bit."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream, ipc
from gemma4_moe.refit.vllm_source import vllm_source
from refit import rank_checks
from support import ranks
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import assert_same_stream, in_order

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LARGEST = 6 * 14 * 10 * 2
ADAPTER = Gemma4MoEStateDictAdapter(None, MoEConfig(6, 10, 7), None)


def read_twice(connection: Connection) -> None:
    for _ in range(2):
        found = {name: tensor.clone() for name, tensor in ipc.receive(connection)}
        connection.send(
            {name: (str(t.dtype), tuple(t.shape), t.view(torch.uint8).tolist()) for name, t in found.items()}
        )


def test_another_process_reads_the_buckets_themselves() -> None:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=read_twice, args=(there,), daemon=True)
    process.start()
    nemo = nemo_from_hf(random_hf_state_dict())
    stream = WeightStream(ADAPTER, nemo, bucket_bytes=LARGEST)
    for _ in range(2):
        ipc.send(stream, here)
        expected = in_order(nemo, layers=2)
        described = {n: (str(t.dtype), tuple(t.shape), t.view(torch.uint8).tolist()) for n, t in expected.items()}
        assert here.recv() == described
        for tensor in nemo.values():
            tensor.neg_()
    process.join(60)
    assert process.exitcode == 0


def test_receiver_ranks_get_the_buckets() -> None:
    ranks.run(3, rank_checks.check_broadcast)


@pytest.mark.parametrize("arguments", [{"dtype": None}, {"dst": 0, "dtype": "bfloat16"}])
def test_a_stream_that_vllm_can_not_take_is_refused(arguments: dict[str, Any]) -> None:
    state = nemo_from_hf(random_hf_state_dict())
    name = "model.language_model.layers.1.layer_scalar"
    with pytest.raises(UsageError, match=r"(?s)several dtypes.*layer_scalar.*set dtype|for one rank"):
        vllm_source(WeightStream(ADAPTER, state | {name: state[name].float()}, **arguments))


def test_a_stream_is_what_sglang_loads() -> None:
    """SGLang's `load_weights` takes an iterable of pairs, on every refit anew."""

    class Engine:
        def load_weights(self, weights: Any) -> None:
            self.weights = {name: tensor.clone() for name, tensor in weights}

    nemo = nemo_from_hf(random_hf_state_dict())
    stream, engine = WeightStream(ADAPTER, nemo), Engine()
    for _ in range(2):
        engine.load_weights(stream)
        assert_same_stream(engine.weights.items(), in_order(nemo, layers=2).items())
