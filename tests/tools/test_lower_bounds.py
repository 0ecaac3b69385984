"""The lower bounds that `make test-oldest` installs: one for each dependency, as pip reads constraints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROJECT = """
[build-system]
requires = ["nanobind>=2.7.0"]
[project]
dependencies = ["click>=8.4.2"]
[project.optional-dependencies]
demo = ["torch>=2.11.0", "transformers[torch]>=5.18.0"]
torch = ["torch>={torch}"]
[dependency-groups]
test = ["triton>=3.6.0; sys_platform == 'linux'"{more}]
lint = ["ruff"]
"""


def bounds(*arguments):
    command = [sys.executable, ROOT / "tools" / "lower_bounds.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def written(path, torch="2.11.0", more=""):
    path.write_text(PROJECT.format(torch=torch, more=more))
    return path


def test_each_dependency_has_one_line(tmp_path):
    found = bounds(written(tmp_path / "pyproject.toml"))
    assert found.stdout.split() == [
        "click==8.4.2",
        "nanobind==2.7.0",
        "torch==2.11.0",
        "transformers==5.18.0",
        "triton==3.6.0",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.12.0"}, "torch has two lower bounds: 2.11.0 and 2.12.0"),
        ({"more": ", 'pytest'"}, "'pytest' is not a name with one lower bound"),
        ({"more": ", 'pytest>=8.3,<9'"}, "'pytest>=8.3,<9' is not a name with one lower bound"),
    ],
)
def test_a_bound_that_no_run_can_choose_is_an_error(change, words, tmp_path):
    found = bounds(written(tmp_path / "pyproject.toml", **change))
    assert found.returncode != 0
    assert words in found.stderr


def test_the_project_has_them():
    assert "torch==2.11.0" in bounds().stdout.split()
