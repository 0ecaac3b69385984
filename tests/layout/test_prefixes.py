"""Names under the prefixes of the two kinds of models, against the names of transformers' own modules."""

import pytest

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.layout.prefixes import fitted, is_multimodal, split

NAMES = {
    model_type: list(build_model(kind).state_dict())
    for kind, model_type in (("multimodal", "gemma4"), ("text", "gemma4_text"))
}
DISTORTIONS = [
    lambda name: f"model.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: name.replace("layers.1.", "layers.1.model.layers.1."),
    lambda name: f"policy.{name}",
    lambda name: f"_forward_module.model.{name}",
    lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
]


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_the_model_fit_as_they_are(kind):
    assert {name: fitted(name, kind) for name in NAMES[kind]} == {name: name for name in NAMES[kind]}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("number", range(len(DISTORTIONS)))
def test_distorted_names_get_their_own_back(kind, number):
    distort = DISTORTIONS[number]
    assert any(distort(name) != name for name in NAMES[kind])
    assert [fitted(distort(name), kind) for name in NAMES[kind]] == NAMES[kind]


def test_text_names_of_one_kind_become_those_of_the_other():
    text = [name for name in NAMES["gemma4"] if not is_multimodal(name)]
    assert sorted(fitted(name, "gemma4_text") for name in text) == sorted(NAMES["gemma4_text"])
    assert len(text) < len(NAMES["gemma4"])


@pytest.mark.parametrize(
    "name", ["model.position_ids", "score.weight", "v_head.norm.bias", "a.norm.weight.scale", "layers.x.norm", ""]
)
def test_a_name_in_no_part_of_the_model_keeps_its_prefix(name):
    assert split(name) == (name, "")
    assert fitted(name, "gemma4") == name


def test_without_a_known_kind_only_wrappers_are_removed():
    assert fitted("module.model.model.layers.0.layer_scalar", "llama") == "model.model.layers.0.layer_scalar"
    assert fitted("module.a", None) == "a"
