"""Every Python snippet of the documents compiles, and has or imports each name that it uses."""

import ast
import builtins
import importlib
import symtable

import pytest

from support.documents import DOCUMENTS, ROOT, blocks

SNIPPETS = [
    pytest.param(code, id=f"{document.relative_to(ROOT)}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(blocks(document.read_text(), "python"), 1)
]


def undefined(code):
    """The names that a snippet uses and has from nowhere."""
    top = symtable.symtable(code, "snippet", "exec")
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables, used = [top], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (symbol.is_global() or table is top)
        }
    return used - own - set(dir(builtins))


@pytest.mark.parametrize("code", SNIPPETS)
def test_every_name_is_in_the_snippet_or_imported(code):
    compile(code, "snippet", "exec")
    assert not undefined(code)


@pytest.mark.parametrize("code", SNIPPETS)
def test_every_name_that_is_imported_from_the_package_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gemma4_moe"):
            for alias in node.names:
                if not hasattr(importlib.import_module(str(node.module)), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("stream.plan()", {"stream"}),
        ("def f(model):\n    return load(model)", {"load"}),
        ("class A:\n    b = c", {"c"}),
        ("import os\ndef f(x):\n    y = [len(z) for z in x]\n    return os, y\nf(1)", set()),
    ],
)
def test_a_name_from_nowhere_is_noticed(code, names):
    assert undefined(code) == names
