"""The preflight: every expert, scale and buffer that a stream would leave out is named."""

import pytest

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import DifferenceError
from gemma4_moe.refit import WeightStream
from support.checkpoints import write_checkpoint
from support.formulas import legacy_name, nemo_from_hf
from support.models import random_hf_state_dict
from support.streams import per_expert

E, H, I = 6, 10, 7  # noqa: E741
HF = random_hf_state_dict()
LAYER = "model.language_model.layers.1."


def stream_of(state=None, **arguments):
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None)
    return WeightStream(nemo_from_hf(HF) if state is None else state, adapter, **arguments)


def shapes(hf=HF):
    return [(name, tuple(tensor.shape)) for name, tensor in hf.items()]


def difference(stream, reference):
    with pytest.raises(DifferenceError) as caught:
        stream.preflight(reference)
    return str(caught.value)


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_a_reference_with_the_same_tensors_passes_in_every_form(experts, tmp_path):
    stream = stream_of(experts=experts)
    stream.preflight(write_checkpoint(tmp_path / "hf", HF))
    stream.preflight(str(tmp_path / "hf"))
    stream.preflight(shapes())
    stream.preflight((legacy_name(name), shape) for name, shape in shapes())
    stream.preflight(shapes(dict(per_expert(HF))))
    stream.preflight(planned.name for planned in stream.plan())


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_every_tensor_that_is_left_out_is_named(experts):
    message = difference(stream_of(experts=experts, layers=[0]), shapes(dict(per_expert(HF))))
    left_out = [name for name, _ in per_expert(HF) if ".layers.0." not in name]
    assert len([name for name in left_out if ".experts." in name]) == 3 * E
    for name in left_out:
        assert f"left out: {name}" in message
    assert f"{len(left_out)} left out, 0 not known" in message


def test_buffers_and_scales_are_named():
    state = nemo_from_hf(HF)
    del state[LAYER + "layer_scalar"]
    assert f"left out: {LAYER}layer_scalar" in difference(stream_of(state), shapes())
    message = difference(stream_of(exclude_key_regex=r".*per_expert_scale"), list(HF))
    assert f"left out: {LAYER}router.per_expert_scale" in message


def test_a_tensor_that_the_engine_does_not_know_or_has_in_another_shape_is_named():
    scale = LAYER + "router.scale"
    unknown, other = (dict(shapes()) for _ in range(2))
    del unknown[scale]
    other[scale] = (H + 1,)
    assert f"not known to the engine: {scale}" in difference(stream_of(), unknown.items())
    assert f"of another shape: {scale}: [{H}] instead of [{H + 1}]" in difference(stream_of(), other.items())


def test_a_tied_tensor_counts_under_both_names():
    state = nemo_from_hf(HF)
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    stream = stream_of(state)
    assert "lm_head.weight" not in {planned.name for planned in stream.plan()}
    stream.preflight(shapes())
    stream.preflight([*shapes(), ("lm_head.weight", tuple(state["lm_head.weight"].shape))])
