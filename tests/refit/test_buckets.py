"""Buckets: the same bytes whatever their size, two buffers and no more, and a consumer that keeps one is told so."""

import json

import pytest
import torch

from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream, unpack
from support.streams import ADAPTER, LARGEST, assert_same_stream, copied, expected_stream, nemo_state

BF16, FP32 = torch.bfloat16, torch.float32


def stream_of(native=BF16, **arguments):
    return WeightStream(ADAPTER, nemo_state(dtype=native), **arguments)


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


def test_a_bucket_is_good_until_the_one_after_the_next_is_asked_for():
    kept = []
    for bucket in stream_of(bucket_bytes=LARGEST).buckets():
        if kept:
            assert kept[-1].buffer.numel()
        if len(kept) > 1:
            with pytest.raises(UsageError, match="kept too long"):
                kept[-2].tensors()
        kept.append(bucket)


@pytest.mark.parametrize("keep", [lambda bucket: bucket.buffer, lambda bucket: bucket.tensors()[0][1][:1]])
def test_debug_mode_detects_only_a_consumer_that_keeps_a_view(keep, monkeypatch):
    monkeypatch.setenv("GEMMA4_MOE_DEBUG", "1")
    buckets = stream_of(bucket_bytes=LARGEST).buckets()
    kept = [keep(next(buckets)), next(buckets).entries]
    with pytest.raises(UsageError, match=r"(?s)still holds a bucket.*embed_tokens"):
        next(buckets)
    assert len(kept) == 2
    orderly = stream_of(bucket_bytes=LARGEST).buckets()
    assert_same_stream(copied(orderly), expected_stream(nemo_state()))


def test_tensors_on_several_devices_need_an_iteration():
    nemo = nemo_state()
    name = "model.language_model.layers.1.moe.experts.down_projs"
    stream = WeightStream(ADAPTER, nemo | {name: nemo[name].to("meta")})
    with pytest.raises(UsageError, match=f"(?s)several devices.*{name}"):
        list(stream.buckets())
