"""Rules of this project that no linter knows, over all Python files of a directory.

    python tools/lint/sources.py DIRECTORY

Prints each line that breaks a rule, and ends with status 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe import errors
from gemma4_moe.layout.table import RULES, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.Gemma4MoEError)
}

#: Views with other axes, and calls that then copy them: two passes over the bytes where a kernel takes one.
VIEWS = {"transpose", "swapaxes", "permute", "swapdims", "movedim", "moveaxis", "mT", "T"}
COPIES = {"contiguous", "clone", "copy", "ascontiguousarray", "copy_", "to", "astype"}

#: The names of the format, and the one module that may spell them.
NAMES = {rule.name(layout) for rule in RULES for layout in Layout}
TABLE = "table.py"

#: A file has one subject, and a function fits on a screen: the most lines of each, the function's docstring apart.
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


def errors_without_a_next_step(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each error that is made without `hint=`, if its class has no usual hint or no fact explains that hint."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            given = {keyword.arg for keyword in node.keywords}
            usual = ERRORS[node.func.id]("").hint is not None
            explained = usual and given & {"tensor", "file", "expected", "found"}
            if not given & {"hint", None} and not explained:
                yield node.lineno, f"{node.func.id} names no next step: give hint="


def transposed_then_copied(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each `x.transpose(...).contiguous()`, `np.ascontiguousarray(x.T)` or the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in COPIES:
            attributes = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            if attributes & VIEWS:
                yield node.lineno, "a transposed view is copied: call gemma4_moe.kernels"


def names_of_the_table(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each string, docstrings apart, that spells a name of the table."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            spelled = [name for name in NAMES if name in node.value]
            if spelled:
                yield node.lineno, f"{node.value!r} spells {max(spelled, key=len)}: ask layout.table"


def longer_than_a_screen(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each function of more than `LONGEST_FUNCTION` lines, and line 1 of a file of more than `LONGEST_FILE`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0
            lines = node.end_lineno - node.lineno + 1 - docstring
            if lines > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines: at most {LONGEST_FUNCTION}"
    last = max((node.end_lineno for node in ast.iter_child_nodes(tree)), default=0)
    if last > LONGEST_FILE:
        yield 1, f"the file has {last} lines: at most {LONGEST_FILE}"


def main(directory: Path) -> None:
    """Apply every rule to every Python file below `directory`."""
    found = [
        f"{path}:{line}: {problem}"
        for path in sorted(directory.rglob("*.py"))
        for tree in [ast.parse(path.read_text())]
        for rule in (errors_without_a_next_step, transposed_then_copied, names_of_the_table, longer_than_a_screen)
        if rule is not names_of_the_table or not (path.name == TABLE or path.parent.name == "spellings")
        for line, problem in rule(tree)
    ]
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
