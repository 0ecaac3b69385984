"""NeMo AutoModel's Gemma 4 MoE model, loaded through our adapter, computes what transformers computes."""

from __future__ import annotations

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model, logits
from support import peer

TOLERANCE = 5e-6


@pytest.mark.parametrize(("layers", "seed"), [(2, 0), (3, 1), (2, 2)])
def test_logits_are_those_of_transformers(layers: int, seed: int) -> None:
    source = build_model("multimodal", layers=layers, seed=seed)
    adapter = Gemma4MoEStateDictAdapter(source.config.text_config, None, None, dtype=torch.float32)
    native = adapter.from_hf(source.state_dict())

    model = peer.model(source.config)
    model.load_state_dict(native, strict=True)

    assert (logits(model) - logits(source)).abs().max().item() <= TOLERANCE


def test_logits_tell_a_fold_that_was_left_out() -> None:
    source = build_model("multimodal", seed=0)
    hf = source.state_dict()
    unscaled = {k: torch.ones_like(v) if k.endswith("per_expert_scale") else v for k, v in hf.items()}
    adapter = Gemma4MoEStateDictAdapter(source.config.text_config, None, None, dtype=torch.float32)

    model = peer.model(source.config)
    model.load_state_dict(adapter.from_hf(unscaled), strict=True)

    assert (logits(model) - logits(source)).abs().max().item() > 1000 * TOLERANCE


def test_their_model_takes_our_adapter_and_its_state_goes_back_to_transformers() -> None:
    source = build_model("multimodal", seed=4)
    adapter = Gemma4MoEStateDictAdapter(source.config.text_config, None, None, dtype=torch.float32)
    model = peer.model(source.config)
    model.state_dict_adapter = adapter
    model.load_state_dict(adapter.from_hf(source.state_dict()), strict=True)

    back = build_model("multimodal", seed=5)
    back.load_state_dict(model.state_dict_adapter.to_hf(model.state_dict()), strict=True)

    assert (logits(back) - logits(source)).abs().max().item() <= TOLERANCE
