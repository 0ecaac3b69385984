"""All pages: links lead somewhere, commands parse, snippets have their imports, and quoted errors are in the code."""

import ast
import builtins
import re
import shlex
from pathlib import Path

import click
import pytest

from gemma4_moe.cli.commands import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = " ".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
#: Names that snippets take from their readers.
GIVEN = {
    *("engine", "engine_model", "model", "published", "client", "connection", "group", "send"),
    *("adapter", "text_config", "moe_config", "backend", "dtype"),
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text):
    """The commands of gemma4-moe in fenced blocks and in backticks."""
    fenced = [line.removeprefix("$ ") for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
              for line in block.splitlines()]  # fmt: skip
    quoted = re.findall(r"`(gemma4-moe [a-z][^`]*)`", text)
    return [line for line in (*fenced, *quoted) if re.match(r"gemma4-moe [a-z]", line) and " && " not in line]


@every_page
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@every_page
def test_every_command_parses(page):
    for line in commands(page.read_text()):
        _, name, *arguments = shlex.split(line)
        if name != "COMMAND" and arguments:  # a bare name stands for the command itself
            try:
                cli.commands[name].make_context(name, arguments)
            except click.exceptions.MissingParameter:
                assert f"`{line}`" in page.read_text(), "a command in a block is whole"


@every_page
def test_every_snippet_has_its_imports(page):
    known = set(dir(builtins)) | GIVEN
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        tree = ast.parse(snippet)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used <= known, used - known


def test_the_errors_that_are_quoted_are_in_the_code():
    page = (ROOT / "docs" / "it-failed.md").read_text()
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith('| "')]
    quoted = [text for cell in first for text in re.findall(r'"([^"]+)"', cell)]
    assert len(quoted) > 15
    missing = [text for text in quoted if text not in SOURCE]
    assert not missing


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == linked
