"""Forms that are not converted: each is known by its tensors' names, and no name of ours is taken for one."""

import pytest

from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.layout.foreign import FOREIGN as FORMS
from gemma4_moe.layout.foreign import foreign_spelling
from gemma4_moe.layout.names import parse
from gemma4_moe.layout.spellings import known_names
from gemma4_moe.layout.table import RULES, Layout
from support.names import KNOWN_PREFIXES

EXPERT = "model.language_model.layers.3.experts.17"
FOREIGN = [
    ("bitsandbytes", "model.layers.0.self_attn.q_proj.weight.absmax"),
    ("bitsandbytes", "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"),
    ("bitsandbytes", "model.layers.0.mlp.up_proj.weight.nested_quant_map"),
    ("bitsandbytes", "model.layers.0.mlp.up_proj.SCB"),
    ("GPTQ", "model.layers.0.mlp.up_proj.g_idx"),
    ("AWQ", "model.layers.0.mlp.up_proj.qweight"),
    ("AWQ", "model.layers.0.mlp.up_proj.qzeros"),
    ("compressed-tensors INT4 (AWQ or GPTQ)", f"{EXPERT}.gate_proj.weight_shape"),
    ("compressed-tensors INT4 (AWQ or GPTQ)", f"{EXPERT}.gate_proj.weight_zero_point"),
    ("FP8 in blocks", f"{EXPERT}.gate_proj.weight_scale_inv"),
    ("FP8 in blocks", "model.language_model.layers.3.experts.gate_up_proj_scale_inv"),
    ("MXFP4", "model.language_model.layers.3.experts.gate_up_proj_blocks"),
    ("MXFP4", "model.language_model.layers.3.experts.down_proj_scales"),
    ("compressed-tensors FP8", f"{EXPERT}.gate_proj.weight_scale"),
    ("compressed-tensors FP8", "model.layers.0.self_attn.q_proj.weight_scale"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.weight_packed"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.weight_global_scale"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.input_global_scale"),
    ("ModelOpt NVFP4", f"{EXPERT}.down_proj.weight_scale_2"),
    ("ModelOpt FP8", "model.language_model.layers.3.experts.down_proj_weight_scale"),
    ("MLX quantised", "language_model.model.layers.0.experts.switch_glu.down_proj.scales"),
    ("MLX quantised", "language_model.model.layers.0.self_attn.q_proj.biases"),
    ("LoRA adapter", "model.layers.0.moe.experts.lora_gate_and_up_A"),
    ("LoRA adapter", "base_model.model.model.layers.0.experts.base_layer.lora_A.weight"),
    ("LoRA adapter", "base_model.model.model.layers.0.experts.lora_B.weight"),
    ("LoRA adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
]


def test_every_foreign_spelling_has_an_example():
    assert {form for form, _ in FOREIGN} == {form.name for form in FORMS if form.tensor is not None}


@pytest.mark.parametrize(("form", "name"), FOREIGN, ids=[row[1][-40:] for row in FOREIGN])
def test_foreign_spellings_are_named_and_those_among_the_experts_refused(form, name):
    found = foreign_spelling(name)
    assert found is not None
    assert found.name == form
    assert found.hint
    if ".experts." in name and not name.startswith("model.decoder.") and "moe.experts.lora_" not in name:
        for layout in Layout:
            with pytest.raises(UnknownTensorError) as raised:
                parse(name, layout)
            assert f"({form})" in raised.value.facts["found"]
            assert raised.value.hint


@pytest.mark.parametrize("prefix", KNOWN_PREFIXES)
def test_no_name_of_the_two_layouts_is_foreign(prefix):
    rests = [*known_names(), *(rule.nemo for rule in RULES)]
    assert [foreign_spelling(f"{prefix}layers.0.{rest}") for rest in rests] == [None] * len(rests)
    assert foreign_spelling(f"{prefix}layers.0.mlp.down_proj.weight") is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.weight_scale_norm",
        "model.layers.0.mlp.input_scale.weight",
        "model.layers.0.mlp.weight_packed_shape",
        "model.layers.0.mlp.weight_scale_20",
        "model.layers.0.experts.0.gate_proj.weight_sum",
        "model.decoder.layers.0.mlp.up_proj.weight",
        "model.exploration_A.weight",
        "model.switch_glut.weight",
    ],
)
def test_a_name_that_only_resembles_a_foreign_one_is_not_foreign(name):
    assert foreign_spelling(name) is None
