"""NeMo AutoModel's model, loaded with transformers' weights by the adapter, computes the same logits."""

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model
from support import peer
from support.logits import TOLERANCE, difference


def adapter_of(source):
    return Gemma4MoEStateDictAdapter(source.config.text_config, None, None, dtype=torch.float32)


def nemo_model(source, hf):
    """NeMo's model of the source's config, with the weights of `hf`."""
    model = peer.model(source.config)
    model.load_state_dict(adapter_of(source).from_hf(hf), strict=True)
    return model


@pytest.mark.parametrize(("layers", "seed"), [(2, 0), (3, 1), (2, 2)])
def test_the_model_of_nemo_has_the_logits_of_transformers_there_and_back(layers, seed):
    source = build_model("multimodal", layers=layers, seed=seed)
    model = nemo_model(source, source.state_dict())
    assert difference(model, source) <= TOLERANCE
    model.state_dict_adapter = adapter_of(source)
    back = build_model("multimodal", layers=layers, seed=seed + 10)
    back.load_state_dict(model.state_dict_adapter.to_hf(model.state_dict()), strict=True)
    assert difference(back, source) <= TOLERANCE


def test_the_logits_tell_a_fold_that_was_left_out():
    source = build_model("multimodal", seed=0)
    hf = source.state_dict()
    unscaled = {k: torch.ones_like(v) if k.endswith("per_expert_scale") else v for k, v in hf.items()}
    assert difference(nemo_model(source, unscaled), source) > 1000 * TOLERANCE
