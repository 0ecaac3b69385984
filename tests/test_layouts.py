"""The table and the grammar of names: what is understood, what passes, and what is refused by name."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import gemma4_moe
from gemma4_moe import layouts
from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.layouts import (
    DOWN,
    EXPERT_RULES,
    FOREIGN_SPELLINGS,
    GATE_UP,
    ROUTER_SCALE,
    ROUTER_WEIGHT,
    RULES,
    SCALE,
    Layout,
    MoEName,
    Operation,
    Rule,
    Spelling,
    foreign_spelling,
    lookup,
    parse,
)
from support.formulas import legacy_name

#: Written out once more, from the documentation of the format.
TABLE = [
    ("experts.gate_up_proj", "moe.experts.gate_and_up_projs", GATE_UP),
    ("experts.down_proj", "moe.experts.down_projs", DOWN),
    ("router.per_expert_scale", "moe.experts.down_projs", SCALE),
    ("router.proj.weight", "moe.gate.proj.weight", ROUTER_WEIGHT),
    ("router.scale", "moe.gate.scale", ROUTER_SCALE),
]
LEGACY = [("moe.gate_up_proj", GATE_UP), ("moe.down_proj", DOWN), ("moe.per_expert_scale", SCALE)]
PREFIXES = [
    "model.language_model.",
    "model.",
    "language_model.",
    "",
    "base_model.model.model.language_model.",
    "base_model.model.model.",
    "model.decoder.",
    "encoder.layers.3.tower.",
    "with a space, a \n newline and ∂.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layer", [0, 1, 29, 10, 123_456_789])
@pytest.mark.parametrize(("hf", "nemo", "rule"), TABLE, ids=[row[0] for row in TABLE])
def test_every_row_leads_both_ways_and_keeps_the_prefix(
    prefix: str, layer: int, hf: str, nemo: str, rule: Rule
) -> None:
    path = f"{prefix}layers.{layer}."
    found = parse(path + hf, Layout.HF)
    assert found == MoEName(prefix, layer, rule, Spelling.CURRENT)
    assert (found.layer_path, found.owner) == (path, (prefix, layer))
    assert (found.hf, found.nemo) == (path + hf, path + nemo)
    assert [found.name(layout) for layout in Layout] == [found.hf, found.nemo]
    if rule is not SCALE:
        assert parse(path + nemo, Layout.NEMO) == found
    assert [found.sibling(other).hf for *_, other in TABLE] == [path + row[0] for row in TABLE]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("rest", "rule"), LEGACY, ids=[row[0] for row in LEGACY])
def test_the_legacy_spelling_means_the_same_row(prefix: str, rest: str, rule: Rule) -> None:
    found = parse(f"{prefix}layers.4.{rest}", Layout.HF)
    assert found == MoEName(prefix, 4, rule, Spelling.LEGACY)
    assert legacy_name(found.hf) == f"{prefix}layers.4.{rest}"
    assert found.sibling(rule).spelling is Spelling.CURRENT


def test_the_operations_and_axes_are_those_of_the_format() -> None:
    found = {rule.role: (rule.operation, " ".join(rule.hf_axes), " ".join(rule.nemo_axes)) for rule in RULES}
    assert found == {
        "gate_up": (Operation.TRANSPOSE, "E 2I H", "E H 2I"),
        "down": (Operation.TRANSPOSE_SCALE, "E H I", "E I H"),
        "scale": (Operation.FOLD, "E", ""),
        "router weight": (Operation.KEEP, "E H", "E H"),
        "router scale": (Operation.KEEP, "H", "H"),
    }
    assert EXPERT_RULES == {Layout.HF: (GATE_UP, DOWN, SCALE), Layout.NEMO: (GATE_UP, DOWN)}
    assert [layout.other for layout in Layout] == [Layout.NEMO, Layout.HF]


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
def test_other_names_are_the_same_in_both_layouts(name: str, layout: Layout) -> None:
    assert parse(name, layout) is None
    assert lookup(name, layout) is None


@pytest.mark.parametrize("suffix", ["_bias", ".weight", ".bias", "s", ".0", "\n", "\0", " ", "."])
@pytest.mark.parametrize(
    ("layout", "rest"),
    [
        *((Layout.HF, row[0]) for row in (*TABLE, *LEGACY)),
        *((Layout.NEMO, rule.nemo) for rule in RULES if rule.in_nemo),
    ],
)
def test_a_name_that_only_begins_like_a_row_is_refused(layout: Layout, rest: str, suffix: str) -> None:
    name = f"model.layers.0.{rest}{suffix}"
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
def test_a_module_of_the_experts_or_the_router_holds_nothing_else(rest: str, layout: Layout) -> None:
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
def test_a_layer_has_a_plain_number(layer: str, layout: Layout, rest: str) -> None:
    with pytest.raises(UnknownTensorError, match="outside a layer") as raised:
        parse(f"model.layers.{layer}.{rest}", layout)
    assert raised.value.facts["expected"] == f"<prefix>layers.<number>.{rest}"


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.layer.0.", "xlayers.0.", "layers.0.block."])
@pytest.mark.parametrize(
    ("layout", "rest"),
    [
        *((Layout.HF, row[0]) for row in (*TABLE, *LEGACY)),
        *((Layout.NEMO, rule.nemo) for rule in RULES if rule.in_nemo),
    ],
)
def test_a_row_outside_a_layer_is_refused(prefix: str, layout: Layout, rest: str) -> None:
    with pytest.raises(UnknownTensorError, match="outside a layer"):
        parse(prefix + rest, layout)


@pytest.mark.parametrize(("hf", "nemo", "rule"), TABLE, ids=[row[0] for row in TABLE])
def test_a_name_of_the_other_layout_says_so(hf: str, nemo: str, rule: Rule) -> None:
    for rest, layout in ((hf, Layout.NEMO), (nemo, Layout.HF)):
        with pytest.raises(UnknownTensorError, match=f"name of the {layout.other} layout") as raised:
            parse(f"model.layers.7.{rest}", layout)
        assert raised.value.facts["tensor"] == f"model.layers.7.{rest}"
        assert "other direction" in str(raised.value.hint)


def test_a_message_shows_control_characters_and_does_not_send_them() -> None:
    with pytest.raises(UnknownTensorError) as raised:
        parse("a\x1b[2Jb.layers.0.experts.evil\x07\n", Layout.HF)
    assert raised.value.facts["tensor"] == r"a\x1b[2Jb.layers.0.experts.evil\x07\n"
    assert all(line.isprintable() for line in str(raised.value).splitlines())


EXPERT = "model.language_model.layers.3.experts.17"
FOREIGN = [
    ("per-expert", f"{EXPERT}.gate_proj.weight"),
    ("per-expert", f"{EXPERT}.up_proj.weight"),
    ("per-expert", f"{EXPERT}.down_proj.weight"),
    ("per-expert", "model.layers.0.moe.experts.0.down_proj.weight"),
    ("compressed-tensors FP8", f"{EXPERT}.gate_proj.weight_scale"),
    ("compressed-tensors FP8", "model.layers.0.self_attn.q_proj.weight_scale"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.weight_packed"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.weight_global_scale"),
    ("compressed-tensors NVFP4", f"{EXPERT}.down_proj.input_global_scale"),
    ("ModelOpt NVFP4", f"{EXPERT}.down_proj.weight_scale_2"),
    ("ModelOpt NVFP4", f"{EXPERT}.down_proj.input_scale"),
    ("MLX", "language_model.model.layers.0.experts.switch_glu.gate_proj.weight"),
    ("MLX", "language_model.model.layers.0.experts.switch_glu.down_proj.scales"),
    ("DiffusionGemma", "model.decoder.layers.0.experts.gate_up_proj"),
    ("DiffusionGemma", "model.decoder.layers.12.router.per_expert_scale"),
    ("DiffusionGemma", "model.encoder.language_model.layers.0.layer_scalar"),
    ("LoRA adapter", "model.layers.0.moe.experts.lora_gate_and_up_A"),
    ("LoRA adapter", "base_model.model.model.layers.0.experts.base_layer.lora_A.weight"),
    ("LoRA adapter", "base_model.model.model.layers.0.experts.lora_B.weight"),
    ("LoRA adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
]


@pytest.mark.parametrize(("form", "name"), FOREIGN, ids=[row[1][-40:] for row in FOREIGN])
def test_foreign_spellings_are_named(form: str, name: str) -> None:
    found = foreign_spelling(name)
    assert found is not None
    assert found.name == form
    assert found.reason


def test_every_foreign_spelling_has_an_example() -> None:
    assert {form for form, _ in FOREIGN} == {form.name for form in FOREIGN_SPELLINGS}


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    ("form", "name"),
    [row for row in FOREIGN if ".experts." in row[1] and not row[1].startswith("model.decoder.")],
    ids=lambda value: value[-40:],
)
def test_a_foreign_name_among_the_experts_is_refused_by_its_form(form: str, name: str, layout: Layout) -> None:
    with pytest.raises(UnknownTensorError) as raised:
        parse(name, layout)
    assert f"({form})" in raised.value.facts["found"]
    assert raised.value.hint


@pytest.mark.parametrize("prefix", PREFIXES[:6])
def test_no_name_of_the_two_layouts_is_foreign(prefix: str) -> None:
    rests = [name for rule in RULES for layout in Layout for name in rule.names(layout)]
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
def test_a_name_that_only_resembles_a_foreign_one_is_not_foreign(name: str) -> None:
    assert foreign_spelling(name) is None


def test_no_two_rows_share_a_name() -> None:
    for layout in Layout:
        names = [name for rule in RULES for name in rule.names(layout)]
        assert len(names) == len(set(names))
    for first, second in itertools.combinations(RULES, 2):
        assert first.role != second.role


def test_a_table_in_which_two_rows_share_a_name_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Rule("twin", "experts.down_proj", "moe.twin", ("E",), ("E",), Operation.KEEP)
    monkeypatch.setattr(layouts, "RULES", (*RULES, twin))
    with pytest.raises(AssertionError, match=r"spelled experts\.down_proj"):
        layouts._lookup(Layout.HF)


def test_no_other_module_knows_these_names() -> None:
    names = {name for rule in RULES for layout in Layout for name in rule.names(layout)}
    found = [
        f"{path.name}:{line}: {text}"
        for path in Path(gemma4_moe.__file__).parent.rglob("*.py")
        if path.name != "layouts.py"
        for line, text in strings_of_code(ast.parse(path.read_text()))
        if any(name in text for name in names)
    ]
    assert found == []


def strings_of_code(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of every string constant that is no docstring."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
    ]
