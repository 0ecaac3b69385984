"""The grammar of names: which are understood, which pass, and which are refused by name."""

import pytest

from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.layout.names import MoEName, lookup, parse
from gemma4_moe.layout.spellings import CURRENT
from gemma4_moe.layout.spellings.fused import LEGACY as LEGACY_SPELLING
from gemma4_moe.layout.table import DOWN, GATE_UP, ROUTER_SCALE, ROUTER_WEIGHT, RULES, SCALE, Layout
from support.formulas import legacy_name
from support.names import PREFIXES

#: Written out once more, from the documentation of the format.
TABLE = [
    ("experts.gate_up_proj", "moe.experts.gate_and_up_projs", GATE_UP),
    ("experts.down_proj", "moe.experts.down_projs", DOWN),
    ("router.per_expert_scale", "moe.experts.down_projs", SCALE),
    ("router.proj.weight", "moe.gate.proj.weight", ROUTER_WEIGHT),
    ("router.scale", "moe.gate.scale", ROUTER_SCALE),
]
LEGACY = [("moe.gate_up_proj", GATE_UP), ("moe.down_proj", DOWN), ("moe.per_expert_scale", SCALE)]
ROWS = [
    *((Layout.HF, row[0]) for row in (*TABLE, *LEGACY)),
    *((Layout.NEMO, rule.nemo) for rule in RULES if rule.in_nemo),
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layer", [0, 1, 29, 10, 123_456_789])
@pytest.mark.parametrize(("hf", "nemo", "rule"), TABLE, ids=[row[0] for row in TABLE])
def test_every_row_leads_both_ways_and_keeps_the_prefix(prefix, layer, hf, nemo, rule):
    path = f"{prefix}layers.{layer}."
    found = parse(path + hf, Layout.HF)
    assert found == MoEName(prefix, layer, rule, CURRENT)
    assert (found.layer_path, found.layer_key) == (path, (prefix, layer))
    assert (found.hf, found.nemo) == (path + hf, path + nemo)
    assert [found.name(layout) for layout in Layout] == [found.hf, found.nemo]
    if rule is not SCALE:
        assert parse(path + nemo, Layout.NEMO) == found
    assert [found.sibling(other).hf for *_, other in TABLE] == [path + row[0] for row in TABLE]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("rest", "rule"), LEGACY, ids=[row[0] for row in LEGACY])
def test_the_legacy_spelling_means_the_same_row(prefix, rest, rule):
    found = parse(f"{prefix}layers.4.{rest}", Layout.HF)
    assert found == MoEName(prefix, 4, rule, LEGACY_SPELLING)
    assert legacy_name(found.hf) == f"{prefix}layers.4.{rest}"
    assert found.sibling(rule).spelling is CURRENT


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "model.language_model.layers.0.layer_scalar",
        "model.language_model.layers.0.mlp.gate_proj.weight",
        "model.language_model.layers.0.mlp.down_proj.weight",
        "model.language_model.layers.0.self_attn.v_proj.weight",
        "model.language_model.layers.0.pre_feedforward_layernorm_2.weight",
        "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight",
        "model.encoder.language_model.layers.0.layer_scalar",
        "layers.0.experts_norm.weight",
        "layers.0.mlp.experts_count",
        "layers.0",
        "lm_head.weight",
        "",
    ],
)
def test_other_names_are_the_same_in_both_layouts(name, layout):
    assert parse(name, layout) is None
    assert lookup(name, layout) is None


@pytest.mark.parametrize("suffix", ["_bias", ".weight", ".bias", "s", ".0", "\n", "\0", " ", "."])
@pytest.mark.parametrize(("layout", "rest"), ROWS)
def test_a_name_that_only_begins_like_a_row_is_refused(layout, rest, suffix):
    name = f"model.layers.0.{rest}{suffix}"
    if layout is Layout.HF and rest.startswith("experts.") and suffix == ".weight":
        assert lookup(name, layout).hf == f"model.layers.0.{rest}"  # a form of its own
        return
    with pytest.raises(UnknownTensorError) as raised:
        parse(name, layout)
    assert raised.value.facts["tensor"] == name.encode("unicode_escape").decode()
    assert lookup(name, layout) is None


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "rest",
    [
        "experts",
        "router",
        "moe",
        "moe.experts",
        "moe.gate",
        "router.bias",
        "moe.gate.bias",
        "experts.",
        "moe.router.scale",
    ],
)
def test_a_module_of_the_experts_or_the_router_holds_nothing_else(rest, layout):
    with pytest.raises(UnknownTensorError, match="does not have") as raised:
        parse(f"model.layers.0.{rest}", layout)
    assert raised.value.facts["found"] == rest
    assert raised.value.facts["expected"].startswith("one of ")
    assert raised.value.hint is not None


@pytest.mark.parametrize(
    "layer",
    ["00", "01", "-1", "+1", "1.", "", "0x1", "1e3", "one", "٣", "²", "1_0", " 1", "1 ", "1\n", "9" * 10, "9" * 5000],
    ids=lambda layer: ascii(layer)[:12],
)
@pytest.mark.parametrize(("layout", "rest"), [(Layout.HF, "router.scale"), (Layout.NEMO, "moe.experts.down_projs")])
def test_a_layer_has_a_plain_number(layer, layout, rest):
    with pytest.raises(UnknownTensorError, match="outside a layer") as raised:
        parse(f"model.layers.{layer}.{rest}", layout)
    assert raised.value.facts["expected"] == f"<prefix>layers.<number>.{rest}"


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.layer.0.", "xlayers.0.", "layers.0.block."])
@pytest.mark.parametrize(("layout", "rest"), ROWS)
def test_a_row_outside_a_layer_is_refused(prefix, layout, rest):
    with pytest.raises(UnknownTensorError, match="outside a layer"):
        parse(prefix + rest, layout)


@pytest.mark.parametrize(("hf", "nemo", "rule"), TABLE, ids=[row[0] for row in TABLE])
def test_a_name_of_the_other_layout_says_so(hf, nemo, rule):
    for rest, layout in ((hf, Layout.NEMO), (nemo, Layout.HF)):
        with pytest.raises(UnknownTensorError, match=f"name of the {layout.other} layout") as raised:
            parse(f"model.layers.7.{rest}", layout)
        assert raised.value.facts["tensor"] == f"model.layers.7.{rest}"
        assert "other direction" in str(raised.value.hint)


def test_a_message_shows_control_characters_and_does_not_send_them():
    with pytest.raises(UnknownTensorError) as raised:
        parse("a\x1b[2Jb.layers.0.experts.evil\x07\n", Layout.HF)
    assert raised.value.facts["tensor"] == r"a\x1b[2Jb.layers.0.experts.evil\x07\n"
    assert all(line.isprintable() for line in str(raised.value).splitlines())
