"""The tensors that a config calls for in the hf layout: every name of a Gemma 4 MoE checkpoint, with its shape.

Axis letters: H hidden size, F inner size of the dense MLP, D size of an attention head, Q and K all query or key heads,
V vocabulary, P size of a per-layer input, N position embeddings, B values of an image patch; E and I as in the table.
The audio tower is not listed: its names start with `AUDIO`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import ConfigError
from gemma4_moe.layout.prefixes import TEXT_PREFIX
from gemma4_moe.layout.table import RULES, Layout, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Shapes = Iterator[tuple[str, tuple[int, ...]]]

#: Beginnings of the names of the audio tower and its projection.
AUDIO = ("model.audio_tower.", "model.embed_audio.")

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)
#: The norms of a layer without experts.
_DENSE_NORMS = _NORMS[:4]

#: The bounds of a clipped linear module.
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def called_for(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a config.json's document calls for, by hf name, current spelling.

    Raises:
        ConfigError: The config lacks a field that decides a name or a shape.
    """
    prefix = TEXT_PREFIX.get(str(config.get("model_type")))
    if prefix is None:
        raise _lacks("model_type")
    text = config.get("text_config", config)
    shapes = dict(_text(text, prefix))
    vision = None if config is text else _object(config, "vision_config")
    if vision is not None:
        shapes |= _vision(vision, text)
    if not ties_embeddings(config):
        shapes["lm_head.weight"] = shapes[f"{prefix}embed_tokens.weight"]
    return shapes


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether the output head of a config's model is its embedding."""
    text = config.get("text_config", config)
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))


def _text(text: Mapping[str, Any], prefix: str) -> Shapes:
    H, V = _size(text, "hidden_size"), _size(text, "vocab_size")  # axis letters
    yield f"{prefix}embed_tokens.weight", (V, H)
    yield f"{prefix}norm.weight", (H,)
    layers, P = _size(text, "num_hidden_layers"), _count(text, "hidden_size_per_layer_input")
    if P:
        yield f"{prefix}embed_tokens_per_layer.weight", (_size(text, "vocab_size_per_layer_input"), layers * P)
        yield f"{prefix}per_layer_model_projection.weight", (layers * P, H)
        yield f"{prefix}per_layer_projection_norm.weight", (P,)
    for layer in range(layers):
        path = f"{prefix}layers.{layer}."
        parts = (_attention(text, layer), _feed_forward(text, layer), _per_layer_input(H, P))
        for name, shape in (pair for part in parts for pair in part):
            yield path + name, shape


def _attention(text: Mapping[str, Any], layer: int) -> Shapes:
    H, (D, heads, is_key_value) = _size(text, "hidden_size"), _heads(text, layer)
    Q, K = _size(text, "num_attention_heads") * D, heads * D
    linear = {"q_proj": (Q, H), "o_proj": (H, Q)}
    norms = ["q_norm"]
    if not _shares_keys(text, layer):
        linear |= {"k_proj": (K, H)} if is_key_value else {"k_proj": (K, H), "v_proj": (K, H)}
        norms.append("k_norm")
    for module, shape in linear.items():
        yield f"self_attn.{module}.weight", shape
        if text.get("attention_bias"):
            yield f"self_attn.{module}.bias", shape[:1]
    for norm in norms:
        yield f"self_attn.{norm}.weight", (D,)


def _heads(text: Mapping[str, Any], layer: int) -> tuple[int, int, bool]:
    """Return the size of a head, the number of key heads, and whether the keys are the values, of a layer."""
    types = text.get("layer_types")
    if not isinstance(types, list) or len(types) <= layer:
        raise _lacks("layer_types")
    D, heads = _size(text, "head_dim"), _size(text, "num_key_value_heads")
    if types[layer] == "sliding_attention":
        return D, heads, False
    is_key_value = bool(text.get("attention_k_eq_v"))
    by_number = _object(text, "per_layer_config") or {}
    own = next((_object(by_number, key) for key in by_number if key.isdecimal() and int(key) == layer), None) or {}
    D = _count(own, "head_dim") or _count(text, "global_head_dim") or D
    if "num_key_value_heads" in own:
        heads = _size(own, "num_key_value_heads")
    elif is_key_value:
        heads = _count(text, "num_global_key_value_heads") or heads
    return D, heads, is_key_value


def _shares_keys(text: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer takes the keys and values of an earlier one."""
    return layer >= _size(text, "num_hidden_layers") - _count(text, "num_kv_shared_layers")


def _feed_forward(text: Mapping[str, Any], layer: int) -> Shapes:
    H, F = _size(text, "hidden_size"), _size(text, "intermediate_size")
    if text.get("use_double_wide_mlp") and _shares_keys(text, layer):
        F *= 2
    for module, shape in (("gate_proj", (F, H)), ("up_proj", (F, H)), ("down_proj", (H, F))):
        yield f"mlp.{module}.weight", shape
    yield "layer_scalar", (1,)
    has_experts = text.get("enable_moe_block", True)
    for norm in _NORMS if has_experts else _DENSE_NORMS:
        yield f"{norm}.weight", (H,)
    if has_experts:
        sizes = {"E": _size(text, "num_experts"), "H": H, "I": _size(text, "moe_intermediate_size")}
        for rule in RULES:
            yield rule.hf, shape_of(rule, Layout.HF, sizes)


def _per_layer_input(H: int, P: int) -> Shapes:
    if P:
        yield "per_layer_input_gate.weight", (P, H)
        yield "per_layer_projection.weight", (H, P)
        yield "post_per_layer_input_norm.weight", (H,)


def _vision(vision: Mapping[str, Any], text: Mapping[str, Any]) -> Shapes:
    H, F, D = (_size(vision, field) for field in ("hidden_size", "intermediate_size", "head_dim"))
    Q, K = (_size(vision, field) * D for field in ("num_attention_heads", "num_key_value_heads"))
    tower = "model.vision_tower."
    N, B = _size(vision, "position_embedding_size"), 3 * _size(vision, "patch_size") ** 2
    yield f"{tower}patch_embedder.position_embedding_table", (2, N, H)
    yield f"{tower}patch_embedder.input_proj.weight", (H, B)
    if vision.get("standardize"):
        yield f"{tower}std_bias", (H,)
        yield f"{tower}std_scale", (H,)
    linear = {"self_attn.q_proj": (Q, H), "self_attn.k_proj": (K, H), "self_attn.v_proj": (K, H)}
    linear |= {"self_attn.o_proj": (H, Q), "mlp.gate_proj": (F, H), "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}
    bounds = _BOUNDS if vision.get("use_clipped_linears") else ()
    for layer in range(_size(vision, "num_hidden_layers")):
        path = f"{tower}encoder.layers.{layer}."
        for module, shape in linear.items():
            yield f"{path}{module}.linear.weight", shape
            for bound in bounds:
                yield f"{path}{module}.{bound}", ()
        for norm in ("q_norm", "k_norm"):
            yield f"{path}self_attn.{norm}.weight", (D,)
        for norm in _DENSE_NORMS:
            yield f"{path}{norm}.weight", (H,)
    yield "model.embed_vision.embedding_projection.weight", (_size(text, "hidden_size"), H)


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise _lacks(field)
    return value


def _count(config: Mapping[str, Any], field: str) -> int:
    """Return an optional size; 0 if the config has none."""
    return _size(config, field) if config.get(field) else 0


def _object(config: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    value = config.get(field)
    if not isinstance(value, dict | None):
        raise _lacks(field)
    return value


def _lacks(field: str) -> ConfigError:
    return ConfigError(
        "config.json does not say which tensors the model has",
        expected=f"a sensible {field}",
        found="none",
        hint="give the model's own config.json",
    )
