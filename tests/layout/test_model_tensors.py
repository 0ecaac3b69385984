"""What a config calls for, against transformers' own modules on the meta device and the inventory of the real model."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Gemma4Config, Gemma4TextConfig

from gemma4_moe.demo import small_models
from gemma4_moe.errors import ConfigError
from gemma4_moe.layout.model_tensors import AUDIO, called_for

REAL = Path(__file__).parents[1] / "data" / "gemma-4-26B-A4B"
TEXT = small_models._TEXT | {"num_hidden_layers": 7, "moe_intermediate_size": 24}
VISION = small_models._VISION | {"num_hidden_layers": 2}
#: Both kinds of attention are among the layers that share no keys, which transformers 5.24 asks for.
MIXED = [*["full_attention", "sliding_attention"] * 3, "full_attention"]

TEXTS = [
    {},
    {"attention_k_eq_v": False},
    {"num_global_key_value_heads": None},
    {"hidden_size_per_layer_input": 16},
    {"num_kv_shared_layers": 2, "layer_types": MIXED},
    {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "layer_types": MIXED},
    {"attention_bias": True},
    {"tie_word_embeddings": False},
    {"num_hidden_layers": 2},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
]
VISIONS = [
    {},
    {"use_clipped_linears": True},
    {"standardize": False},
    {"attention_bias": True},
    {"num_key_value_heads": 1},
]


def shapes_of(cls, config, *, tied):
    """The state dict of transformers' own module, without a head that is the embedding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            state = cls(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if name != "lm_head.weight" or not tied}


@pytest.mark.parametrize("change", TEXTS, ids=str)
def test_text_only(change):
    config = Gemma4TextConfig(**(TEXT | change))
    expected = shapes_of(transformers.Gemma4ForCausalLM, config, tied=change.get("tie_word_embeddings", True))
    assert called_for(config.to_dict()) == expected


@pytest.mark.parametrize("change", TEXTS[:3], ids=str)
def test_the_fields_of_the_first_published_configs(change):
    config = Gemma4TextConfig(**(TEXT | change))
    document = {name: value for name, value in config.to_dict().items() if name != "per_layer_config"}
    for name in ("global_head_dim", "num_global_key_value_heads"):
        document[name] = (TEXT | change)[name]
    assert called_for(document) == shapes_of(transformers.Gemma4ForCausalLM, config, tied=True)


@pytest.mark.parametrize("change", VISIONS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_multimodal(change, tied):
    config = Gemma4Config(text_config=TEXT, vision_config=VISION | change, tie_word_embeddings=tied)
    expected = shapes_of(transformers.Gemma4ForConditionalGeneration, config, tied=tied)
    assert called_for(config.to_dict()) == expected


def test_the_audio_tower_is_not_listed_and_known_by_its_names():
    config = Gemma4Config(text_config=TEXT, vision_config=VISION, audio_config={"num_hidden_layers": 1})
    expected = shapes_of(transformers.Gemma4ForConditionalGeneration, config, tied=True)
    assert any(name.startswith(AUDIO) for name in expected)
    rest = {name: shape for name, shape in expected.items() if not name.startswith(AUDIO)}
    assert called_for(config.to_dict()) == rest


def test_without_a_vision_tower():
    config = Gemma4Config(text_config=TEXT, vision_config=None)
    assert called_for(config.to_dict()) == shapes_of(transformers.Gemma4ForConditionalGeneration, config, tied=True)


def test_the_real_model():
    inventory = json.loads((REAL / "inventory.json").read_text())
    expected = {name: tuple(shape) for name, shape in inventory["shapes"].items()}
    assert called_for(json.loads((REAL / "config.json").read_text())) == expected
    assert len(expected) == 1013


@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "head_dim", "layer_types", "num_experts", "intermediate_size"]
)
def test_a_config_that_lacks_a_field_is_refused_by_name(field):
    document = Gemma4TextConfig(**TEXT).to_dict()
    del document[field]
    with pytest.raises(ConfigError, match=f"a sensible {field}"):
        called_for(document)
