"""The published forms: the name of every part, what it holds, and forms that can't be."""

import pytest
import torch

from gemma4_moe.layout import spellings
from gemma4_moe.layout.spellings import SPELLINGS, WHOLE, Part, Spelling, find, known_names
from gemma4_moe.layout.spellings.fused import CURRENT, LEGACY
from gemma4_moe.layout.spellings.per_expert import PER_EXPERT
from gemma4_moe.layout.table import DOWN, GATE_UP, RULES, SCALE, Layout, shape_of
from support.forms import BANKS, SINGLE

SIZES = {"E": 3, "H": 10, "I": 7}
FORMS = (*SPELLINGS, BANKS, SINGLE)


def test_the_names_of_each_form_are_those_that_are_published():
    assert [(form.name, form.writable) for form in SPELLINGS] == [
        ("current", True),
        ("legacy", False),
        ("fused with .weight", False),
        ("unfused", False),
        ("unfused", False),
        ("per-expert", True),
        *[("per-expert", False)] * 3,
        *[("vLLM's fused names", False)] * 4,
        ("MLX", False),
    ]
    assert [rest for rule in (GATE_UP, DOWN, SCALE) for rest, _ in PER_EXPERT.parts(rule, 2)] == [
        "experts.0.gate_proj.weight",
        "experts.0.up_proj.weight",
        "experts.1.gate_proj.weight",
        "experts.1.up_proj.weight",
        "experts.0.down_proj.weight",
        "experts.1.down_proj.weight",
        "router.per_expert_scale",
    ]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.role)
def test_the_parts_of_a_role_cover_it_once_and_are_found_by_name(form, rule, monkeypatch):
    monkeypatch.setattr(spellings, "SPELLINGS", (form,))
    shape = shape_of(rule, Layout.HF, SIZES)
    covered = torch.zeros(shape, dtype=torch.int)
    for rest, part in form.parts(rule, SIZES["E"]):
        assert find(rest) == (form, rule, part)
        piece = covered
        if part != WHOLE:
            (first, last), (top, bottom) = part.experts(shape[0]), part.rows(shape[1])
            piece = covered[first:last, top:bottom]
            assert part.shape(shape) == tuple(piece.shape)[0 if part.expert is None else 1 :]
        sizes = SIZES | {"2I": 2 * SIZES["I"]}
        assert tuple(sizes[axis] for axis in part.axes(rule.hf_axes)) == part.shape(shape)
        piece += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("number", ["00", "01", "-1", "", "x", "٣", "1" * 10, " 1", "1.0", "{}"])
def test_an_expert_has_a_plain_number(number):
    assert find(f"experts.{number}.gate_proj.weight") is None
    assert find("experts.10.up_proj.weight") == (PER_EXPERT, GATE_UP, Part(10, 1, 2))
    assert find("experts.10.up_proj.weight\n") is None


def test_a_name_belongs_to_the_first_form_that_has_it(monkeypatch):
    assert find("experts.down_proj") == (CURRENT, DOWN, WHOLE)
    assert find("moe.down_proj") == (LEGACY, DOWN, WHOLE)
    assert find("router.scale")[0] is CURRENT  # shared by all: the first has it
    assert "experts.{}.down_proj.weight" in known_names()
    assert find("moe.w12.one") is None
    monkeypatch.setattr(spellings, "SPELLINGS", (*SPELLINGS, SINGLE))
    assert find("moe.w12.one") == (SINGLE, GATE_UP, Part(12, 0, 2))
    assert "moe.w{}.one" in known_names()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({GATE_UP: ("experts.down_proj",)}, "two tensors of wrong are called experts.down_proj"),
        ({DOWN: ("a", "b")}, "can't store down as a, b"),
        ({GATE_UP: ("a", "b", "c")}, "can't store gate_up"),
        ({GATE_UP: ("a.{}", "b")}, "can't store gate_up"),
        ({GATE_UP: ()}, "can't store gate_up"),
        ({SCALE: ("scale.{}",)}, "can't store scale"),
    ],
)
def test_a_form_that_can_not_be_is_refused_when_it_is_built(names, words):
    with pytest.raises(AssertionError, match=words):
        Spelling("wrong", names)
