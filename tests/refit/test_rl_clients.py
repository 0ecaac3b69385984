"""SGLang's flattened buckets and verl's per-tensor generator, each with the released class that consumes it."""

import asyncio
import multiprocessing
from threading import Thread

import pytest
import torch
import torch.multiprocessing  # registers how a connection sends tensors

from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream
from gemma4_moe.refit.sglang_bucket import sglang_bucket
from gemma4_moe.refit.verl_params import per_tensor_param
from support import engines
from support.streams import ADAPTER, LARGEST, assert_same_stream, expected_stream, nemo_state


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_sglang_reconstructs_every_tensor_of_a_bucket(monkeypatch, experts):
    engines.sglang_buckets(monkeypatch)
    nemo, found, count = nemo_state(), [], 0
    for bucket in WeightStream(nemo, ADAPTER, experts=experts, bucket_bytes=LARGEST).buckets():
        flattened = sglang_bucket(bucket)
        assert flattened.get_flattened_tensor().data_ptr() == bucket.shareable().data_ptr(), "copied"
        found += [(name, tensor.clone()) for name, tensor in flattened.reconstruct_tensors()]
        count += 1
    assert count >= 3
    assert_same_stream(found, expected_stream(nemo, experts=experts))


def reconstruct(connection):
    """Play the engine's process: build SGLang's bucket of a tensor that came as a handle, and of its metadata."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        buckets = engines.sglang_buckets(monkeypatch)
        while (received := connection.recv()) is not None:
            tensors = buckets.FlattenedTensorBucket(**received).reconstruct_tensors()
            connection.send([(name, tensor.clone().float().tolist()) for name, tensor in tensors])


def test_sglang_reconstructs_in_another_process(monkeypatch):
    engines.sglang_buckets(monkeypatch)
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=reconstruct, args=(there,), daemon=True)
    process.start()
    there.close()
    nemo, found = nemo_state(), []
    for bucket in WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST).buckets():
        flattened = sglang_bucket(bucket)
        here.send({"flattened_tensor": flattened.get_flattened_tensor(), "metadata": flattened.get_metadata()})
        found += here.recv()
    here.send(None)
    process.join(60)
    assert found == [(name, tensor.float().tolist()) for name, tensor in expected_stream(nemo)]


def test_verl_sends_the_stream_in_its_own_buckets(monkeypatch, tmp_path):
    """verl's smallest bucket is 1 MiB, so the vocabulary is large enough for several."""
    transfer = engines.verl_bucketed_transfer(monkeypatch)
    nemo = nemo_state()
    for layer in range(3):
        nemo[f"model.language_model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(700, 431 + layer)
    params, lora = per_tensor_param(WeightStream(nemo, ADAPTER))
    assert lora is None
    address, found, sizes = f"ipc://{tmp_path}/verl.sock", [], []

    def received(weights, is_last):
        found.extend((name, tensor.clone()) for name, tensor in weights)
        sizes.append(len(weights))
        del weights

    receiver = transfer.BucketedWeightReceiver(address, torch.device("cpu"), use_shm=True)
    thread = Thread(target=receiver.receive_weights, args=(received,), daemon=True)
    sender = transfer.BucketedWeightSender(address, bucket_size_mb=2, use_shm=True)
    thread.start()
    asyncio.run(sender.async_send_weights(params))
    thread.join(60)
    assert not thread.is_alive()
    assert len(sizes) >= 3
    assert_same_stream(found, expected_stream(nemo))


def test_verl_may_keep_every_tensor():
    """Its SGLang rollout gathers tensors into a list, and sends them once the list is large."""
    nemo = nemo_state()
    params, _ = per_tensor_param(WeightStream(nemo, ADAPTER, bucket_bytes=LARGEST, buffers=2))
    assert_same_stream(list(params), expected_stream(nemo))


def test_a_stream_for_one_rank_is_not_for_verl():
    with pytest.raises(UsageError, match=r"for one rank"):
        per_tensor_param(WeightStream(nemo_state(), ADAPTER, dst=0))
