"""docs/forms.md explains every form of the registry, by signs that the registry recognises."""

import re
from pathlib import Path

import pytest

from gemma4_moe.layout.foreign import FOREIGN
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.spellings import SPELLINGS
from gemma4_moe.layout.table import Layout

PAGE = (Path(__file__).parents[2] / "docs" / "forms.md").read_text()
COLUMNS = 5
ROWS = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
BY_NAME = {row[0]: row for row in ROWS if len(row) == COLUMNS and row[0] != "form"}
CONVERTED = (*dict.fromkeys(form.name for form in SPELLINGS), "nemo")


def test_the_page_and_the_registry_have_the_same_forms_in_the_same_order():
    named = list(BY_NAME)
    assert sorted(named[: len(CONVERTED)]) == sorted(CONVERTED)
    assert named[len(CONVERTED) :] == [form.name for form in FOREIGN]


def signs(cell):
    """The kind and the text of each sign of a cell, such as ("tensor", "a.absmax")."""
    for part in cell.split(";"):
        kind = part.split()[0]
        for text in re.findall(r"`([^`]+)`", part):
            yield kind, text


@pytest.mark.parametrize("form", FOREIGN, ids=lambda form: form.name)
def test_each_sign_is_one_of_the_registrys_and_of_no_earlier_row(form):
    recognisers = {
        "tensor": lambda each, text: each.tensor is not None and each.tensor.fullmatch(text),
        "file": lambda each, text: each.file is not None and each.file.fullmatch(text),
        "model_type": lambda each, text: text in each.model_types,
        "quant_method": lambda each, text: text in each.quant_methods,
    }
    found = list(signs(BY_NAME[form.name][2]))
    for kind, text in found:
        assert next(each for each in FOREIGN if recognisers[kind](each, text)) is form, text
    said = {kind for kind, _ in found}
    have = {
        "tensor": form.tensor,
        "file": form.file,
        "model_type": form.model_types,
        "quant_method": form.quant_methods,
    }
    assert said == {kind for kind, value in have.items() if value}


@pytest.mark.parametrize("name", CONVERTED)
def test_the_converted_forms_are_read(name):
    signs = [sign for sign in re.findall(r"`([^`]+)`", BY_NAME[name][2]) if "_" in sign]
    assert signs
    for sign in signs:
        found = lookup(f"model.layers.0.{sign}", Layout.NEMO if name == "nemo" else Layout.HF)
        assert found is not None
        assert name == "nemo" or found.spelling.name == name


@pytest.mark.parametrize("form", FOREIGN, ids=lambda form: form.name)
def test_no_next_step_takes_weights_away(form):
    assert not re.search(r"\b(remove|delete)\b", form.hint)
