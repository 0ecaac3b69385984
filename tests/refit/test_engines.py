"""Engines load a stream strictly, and it has the tensors that NeMo-RL's own loop sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model, logits
from gemma4_moe.refit import WeightStream
from support.streams import assert_same_stream


def native(model: Any) -> tuple[Gemma4MoEStateDictAdapter, dict[str, Any]]:
    adapter = Gemma4MoEStateDictAdapter(model.config, None, None)
    return adapter, adapter.from_hf({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"})


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_transformers_loads_a_stream_strictly(kind: Any) -> None:
    trained, engine = build_model(kind, seed=1), build_model(kind, seed=2)
    sent = dict(WeightStream(*native(trained)))
    tied = next(name for name in sent if name.endswith("embed_tokens.weight"))
    engine.load_state_dict(sent | {"lm_head.weight": sent[tied]}, strict=True)
    torch.testing.assert_close(logits(engine), logits(trained), rtol=0, atol=1e-4)


def test_the_loop_of_nemo_rl_sends_the_same() -> None:
    adapter, state = native(build_model())
    sent = []
    for fqn, tensor in state.items():
        pairs = adapter.convert_single_tensor_to_hf(
            fqn, tensor, exclude_key_regex=r".*_extra_state.*", quantization=False
        )
        sent += [(name, converted.to(torch.bfloat16).contiguous()) for name, converted in pairs]
    stream = WeightStream(adapter, state, dtype=torch.bfloat16)
    order = {planned.name: place for place, planned in enumerate(stream.plan())}
    assert_same_stream(stream, sorted(sent, key=lambda pair: order[pair[0]]))
