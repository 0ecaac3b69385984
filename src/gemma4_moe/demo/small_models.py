"""A small random Gemma 4 mixture-of-experts model, built with transformers, for the demo and for tests.

It has every kind of tensor of the real model (sliding and full attention, `attention_k_eq_v`, tied embeddings, a vision
tower) in sizes that all differ: E = 6 experts, H = 64, and by default I = 24, 2I = 48. No scale, norm or layer scalar
is one, so that a tensor that is lost, exchanged or folded wrongly changes the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from gemma4_moe.layout.table import ROUTER_WEIGHT

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

#: Token ids below this one are words; the others are placeholders of images, video and audio.
WORDS = 480

_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 40,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_global_key_value_heads": 1,
    "global_head_dim": 64,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 20,
    "standardize": True,
}
_SPECIAL_TOKENS: dict[str, Any] = {
    "boi_token_id": 500,
    "eoi_token_id": 501,
    "image_token_id": 502,
    "video_token_id": 503,
    "boa_token_id": 504,
    "eoa_token_index": 505,
    "audio_token_id": 506,
}


def build_model(
    kind: Literal["multimodal", "text"] = "multimodal",
    *,
    layers: int = 2,
    expert_size: int = 24,
    dtype: str = "float32",
    seed: int = 0,
) -> PreTrainedModel:
    """Return a `Gemma4ForConditionalGeneration` or a `Gemma4ForCausalLM` with random weights, ready to be called.

    Args:
        kind: "multimodal" has a vision tower and names that begin with `model.language_model.`; "text" has neither.
        layers: Number of decoder layers, at least 2: the last has full attention, the others have sliding attention.
        expert_size: I. Kernels of some engines need a multiple of 32.
        dtype: torch's name of the weights' dtype.
        seed: Decides every weight.
    """
    import torch
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    layer_types = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    sizes = {"num_hidden_layers": layers, "moe_intermediate_size": expert_size}
    text = _TEXT | sizes | {"layer_types": layer_types}
    model: Any
    if kind == "text":
        model = Gemma4ForCausalLM(Gemma4TextConfig(**text))
    else:
        config = Gemma4Config(text_config=text, vision_config=_VISION, audio_config=None, **_SPECIAL_TOKENS)
        model = Gemma4ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied: the same storage as the embedding
            _fill(name, tensor, generator)
    ready: PreTrainedModel = model.to(getattr(torch, dtype)).eval()
    return ready


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Draw `tensor` so that logits spread over about one unit and rounding errors in fp32 are not amplified.

    With these ranges a fold in fp32 changes the logits by up to 2e-6, and a lost scale by more than 0.3.
    """
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        tensor.uniform_(0.2, 0.6, generator=generator)
    elif name.endswith("language_model.norm.weight") or name == "model.norm.weight":
        tensor.uniform_(3.0, 5.0, generator=generator)
    elif tensor.ndim == 1:
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("embed_tokens.weight"):
        tensor.normal_(0.0, 0.02, generator=generator)
    elif name.endswith(ROUTER_WEIGHT.hf):
        tensor.normal_(0.0, 0.5, generator=generator)
    else:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


def save_model(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "200KB") -> None:
    """Write `model` to `directory` as transformers publishes it; the shard size is small, to give several files."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def logits(model: PreTrainedModel, *, seed: int = 0) -> torch.Tensor:
    """Return the logits [2, 24, vocabulary] of two random texts that are longer than the sliding window."""
    import torch

    tokens = torch.randint(3, WORDS, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens).logits
    return output
