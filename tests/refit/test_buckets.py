"""Buckets: the same bytes whatever their size, in two buffers, or in more for a consumer that defers its work."""

import json

import pytest
import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream, unpack
from support.streams import ADAPTER, LARGEST, assert_same_stream, copied, expected_stream, nemo_state

BF16, FP32 = torch.bfloat16, torch.float32


def stream_of(native=BF16, **arguments):
    return WeightStream(nemo_state(dtype=native), ADAPTER, **arguments)


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("bucket_bytes", [LARGEST, LARGEST + 1, 3000, 5 * LARGEST, 2**20])
def test_buckets_of_any_size_give_the_same_bytes(experts, dtype, bucket_bytes):
    stream = stream_of(dtype, dtype=BF16, experts=experts, bucket_bytes=bucket_bytes)
    expected = expected_stream(nemo_state(dtype=dtype), experts=experts, dtype=BF16)
    for _ in range(2):
        assert_same_stream(copied(stream.buckets()), expected)


def test_offsets_are_aligned_and_entries_are_json():
    for bucket in stream_of(bucket_bytes=3000).buckets():
        assert bucket.buffer.dtype == torch.uint8
        assert bucket.buffer.numel() <= 3072
        end = 0
        for entry in bucket.entries:
            assert entry.offset % 512 == 0
            assert entry.offset >= end
            end = entry.offset + entry.nbytes
        again = unpack(bucket.buffer, json.loads(json.dumps(bucket.entries)))
        assert_same_stream(again, bucket.tensors())
        for _, tensor in again:
            assert tensor.untyped_storage().data_ptr() == bucket.buffer.untyped_storage().data_ptr()


def test_a_tensor_larger_than_a_bucket_is_refused_before_the_first_byte_or_gets_one_of_its_own():
    with pytest.raises(UsageError, match=f"(?s)gate_up_proj.*{LARGEST - 1}.*{LARGEST}.*oversize.*per-expert"):
        next(stream_of(bucket_bytes=LARGEST - 1).buckets())
    stream = stream_of(bucket_bytes=LARGEST - 1, oversize="own")
    sizes = [(len(bucket.entries), bucket.buffer.numel()) for bucket in stream.buckets()]
    assert sizes.count((1, 2048)) == 3  # 1,680 bytes, aligned
    assert_same_stream(copied(stream.buckets()), expected_stream(nemo_state()))


def test_two_buffers_serve_all_buckets():
    places = [bucket.buffer.data_ptr() for bucket in stream_of(bucket_bytes=LARGEST).buckets()]
    assert len(places) > 4
    assert len(set(places)) == 2
    assert places[:-2] == places[2:]


@pytest.mark.parametrize("keep", [lambda bucket: bucket, lambda bucket: bucket.tensors(copy_up_to=0)[0][1][:1]])
def test_a_consumer_that_holds_every_buffer_is_told_which(keep):
    buckets = stream_of(bucket_bytes=LARGEST, buffers=2).buckets()
    kept = [keep(next(buckets)), keep(next(buckets))]
    with pytest.raises(UsageError, match=r"(?s)still holds all 2 buffers.*embed_tokens.*more than 2"):
        next(buckets)
    assert len(kept) == 2


@pytest.mark.parametrize("oversize", ["error", "own"])
@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_a_consumer_that_defers_until_a_layer_is_complete_gets_its_bits(experts, oversize):
    """As an engine does that keeps the arguments of every load until a module has them all."""
    largest = LARGEST if oversize == "error" else LARGEST - 1
    stream = stream_of(experts=experts, oversize=oversize, bucket_bytes=largest)
    expected = expected_stream(nemo_state(), experts=experts)
    layers = [name.partition("layers.")[2].partition(".")[0] for name, _ in expected]
    for _ in range(2):
        loaded, kept, buckets = [], [], 0
        for bucket in stream.buckets():
            buckets += 1
            for name, tensor in bucket.tensors(copy_up_to=0):
                kept.append((name, tensor))
                place = len(loaded) + len(kept)
                if place == len(layers) or layers[place] != layers[place - 1]:
                    loaded += [(each, view.clone()) for each, view in kept]
                    kept.clear()
        assert buckets >= 3
        assert_same_stream(loaded, expected)


def test_the_memory_is_said_beforehand():
    stream = stream_of(bucket_bytes=LARGEST)
    buckets = list(stream_of(bucket_bytes=LARGEST, buffers=99).buckets())
    layers = [{entry.name.partition("layers.")[2].partition(".")[0] for entry in bucket.entries} for bucket in buckets]
    assert stream.buffers() == (
        1 + max(sum(layer in found for found in layers) for layer in "012"),
        max(bucket.buffer.numel() for bucket in buckets),
    )
    assert stream_of(bucket_bytes=2**20).buffers()[0] == 2


def test_tensors_on_several_devices_need_an_iteration():
    nemo = nemo_state()
    name = "model.language_model.layers.1.moe.experts.down_projs"
    stream = WeightStream(nemo | {name: nemo[name].to("meta")}, ADAPTER)
    with pytest.raises(UsageError, match=f"(?s)several devices.*{name}"):
        list(stream.buckets())
