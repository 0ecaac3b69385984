"""A model in the hf layout, such as one of transformers, is sent as it is: its values, and its real scales."""

import pytest
import torch

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.errors import IncompleteExpertsError, TensorShapeError
from gemma4_moe.refit import WeightStream
from support.formulas import legacy_name
from support.models import random_hf_state_dict
from support.streams import E, H, I, assert_same_stream, copied, per_expert

BF16, FP32 = torch.bfloat16, torch.float32


def hf_state(dtype=BF16):
    return random_hf_state_dict(layers=3, E=E, H=H, I=I, dtype=dtype)


def expected(hf, experts, dtype=None):
    cast = {name: tensor.to(dtype or tensor.dtype) for name, tensor in sorted(hf.items())}
    return per_expert(cast) if experts == "per-expert" else list(cast.items())


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize(("own", "dtype"), [(BF16, None), (FP32, BF16), (BF16, FP32)])
def test_values_are_sent_unchanged(experts, own, dtype):
    hf = hf_state(own)
    assert (hf["model.language_model.layers.0.router.per_expert_scale"] != 1).any()
    for state in (hf, {legacy_name(name): tensor for name, tensor in hf.items()}):
        stream = WeightStream(state, experts=experts, dtype=dtype, bucket_bytes=2**12)
        assert_same_stream(stream, [(n, t.contiguous()) for n, t in expected(hf, experts, dtype)])
        assert_same_stream(copied(stream.buckets()), [(n, t.contiguous()) for n, t in expected(hf, experts, dtype)])


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_a_model_of_transformers_streams_as_it_is(kind):
    model, engine = build_model(kind, seed=1), build_model(kind, seed=2)
    stream = WeightStream(model)
    engine.load_state_dict(dict(stream), strict=False)
    state = engine.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    stream.preflight([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()])


def test_it_is_checked_like_a_checkpoint():
    hf = hf_state()
    scale = "model.language_model.layers.1.router.per_expert_scale"
    with pytest.raises(IncompleteExpertsError, match="layer 1: scale missing"):
        WeightStream({name: tensor for name, tensor in hf.items() if name != scale})
    with pytest.raises(TensorShapeError, match="wrong shape"):
        WeightStream(hf | {scale: torch.ones(E + 1, dtype=BF16)})
    without = WeightStream(hf, exclude_key_regex=r".*(per_expert_scale|moe\.gate\.proj)")
    left = [(n, t) for n, t in expected(hf, "fused") if not n.endswith(("per_expert_scale", "router.proj.weight"))]
    names = [name for name, _ in left if not name.endswith("experts.down_proj")]
    assert [name for name, _ in without if not name.endswith("experts.down_proj")] == names
