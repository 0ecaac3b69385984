"""vLLM loads what is exported, and is refitted: its greedy tokens are transformers', 64 of 64, in fp32."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from engine import NEW_TOKENS, expected, generate, load
from safetensors.torch import save_file

from gemma4_moe import Gemma4MoEStateDictAdapter, convert
from gemma4_moe.demo import small_models
from gemma4_moe.errors import UsageError
from gemma4_moe.refit import WeightStream
from gemma4_moe.refit.vllm_source import vllm_source

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["multimodal", "text"]


#: Enough that a bucket held for each layer is noticed. vLLM keeps a router's small tensors until the end of a reload:
#: its module has a buffer that no checkpoint has. So these are sent as copies.
LAYERS = 6
#: The least number of buckets, and arguments of a stream. In fp32 the experts of a layer are tensors of 147,456 and
#: 294,912 bytes, and the embedding is one of 131,072.
BUCKETS = [
    (1, {}),
    (3, {"bucket_bytes": 294_912}),
    (5, {"bucket_bytes": 100_000, "oversize": "own"}),
]


def refit(llm: Any, stream: WeightStream) -> int:
    """Load every bucket, and return their number."""
    count = 0
    llm.start_weight_update()
    for bucket in stream.buckets():
        count += 1
        llm.update_weights({"update_info": {"weights": bucket.tensors(copy_up_to=4096)}})
    llm.finish_weight_update()
    return count


def lively_model(kind: Kind, seed: int) -> Any:
    """A small model that does not repeat one token, and never finds a placeholder of an image most likely.

    I is a multiple of 32: vLLM pads other sizes on the CPU when it loads, and can't reload what it has padded.
    """
    model = small_models.build_model(kind, layers=LAYERS, expert_size=96, seed=seed)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name.endswith("embed_tokens.weight"):
                tensor[small_models.WORDS :] = 0
            elif name in ("model.language_model.norm.weight", "model.norm.weight"):
                tensor.mul_(5)
    return model


def native(model: Any) -> tuple[dict[str, torch.Tensor], Gemma4MoEStateDictAdapter]:
    adapter = Gemma4MoEStateDictAdapter(model.config, None, None)
    return adapter.from_hf({name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}), adapter


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_an_exported_directory_generates_and_is_refitted(kind: Kind, experts: Any, tmp_path: Path) -> None:
    model = lively_model(kind, seed=0)
    exported = export(model, tmp_path, experts)
    llm = load(exported)
    tokens = generate(llm)
    assert len(set(tokens)) > NEW_TOKENS // 4, "a model that repeats itself proves nothing"
    assert tokens == expected(model)

    llm.init_weight_transfer_engine({"init_info": {}})
    for seed, (least, options) in enumerate(BUCKETS, start=1):
        changed = lively_model(kind, seed=seed)
        stream = WeightStream(*native(changed), experts=experts, **options)
        stream.preflight(exported)
        assert refit(llm, stream) >= least
        assert generate(llm) == expected(changed) != tokens

    changed = lively_model(kind, seed=9)
    source = vllm_source(WeightStream(*native(changed), experts=experts))
    llm.start_weight_update()
    for _, weights in zip(source.groups(), source.iter_groups(), strict=True):
        llm.update_weights({"update_info": {"weights": list(zip(*weights, strict=True))}})
    llm.finish_weight_update()
    assert generate(llm) == expected(changed) != tokens


def test_the_metadata_are_what_is_sent() -> None:
    source = vllm_source(WeightStream(*native(small_models.build_model()), dtype="bfloat16"))
    for _ in range(2):
        sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert sent == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    names = [name for name, _, _ in sent]
    assert sorted(names) == sorted(set(names))
    assert any(name.endswith("per_expert_scale") for name in names)
    assert any(name.endswith("layer_scalar") for name in names)


def test_several_dtypes_are_refused() -> None:
    state, adapter = native(small_models.build_model())
    name = next(name for name in state if name.endswith("layer_scalar"))
    with pytest.raises(UsageError, match=r"(?s)several dtypes.*dtype="):
        vllm_source(WeightStream(state | {name: state[name].bfloat16()}, adapter))


def export(model: Any, directory: Path, experts: str) -> Path:
    """Publish, convert to nemo, and back to hf: by the converter, or, expert by expert, by the stream."""
    small_models.save_model(model, directory / "published")
    convert(directory / "published", directory / "nemo")
    convert(directory / "nemo", directory / "hf")
    if experts == "fused":
        return directory / "hf"
    target = directory / "per-expert"
    target.mkdir()
    save_file(dict(WeightStream(*native(model), experts="per-expert")), target / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "published" / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config))
    return target
