"""The lint over sources: each rule finds a bad line beside a good one."""

import subprocess
import sys
from pathlib import Path

import pytest

LINT = Path(__file__).parents[2] / "tools" / "lint" / "sources.py"


NAME = "moe.experts.down_projs"


def lint(directory):
    return subprocess.run([sys.executable, LINT, directory], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("bad", "good", "problem"),
    [
        ("ParallelError('wrong', found=1)", "ParallelError('wrong', hint='x')", "ParallelError names no next step"),
        ("UsageError('wrong')", "UsageError('wrong', expected=1)", "UsageError names no next step"),
        ("x.transpose(1, 2).contiguous()", "x.transpose(1, 2)", "a transposed view is copied"),
        ("np.ascontiguousarray(x.swapaxes(1, 2))", "np.ascontiguousarray(x)", "a transposed view is copied"),
        (f"f(p + '{NAME}')", f"'''{NAME}'''", f"'{NAME}' spells {NAME}"),
        ("def f():" + "\n    x()" * 60, "def f(): x()", "f has 61 lines"),
    ],
)
def test_each_rule_finds_its_line(bad, good, problem, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/module.py").write_text(f"{good}\n{bad}\n")
    found = lint(tmp_path)
    assert found.returncode == 1
    assert found.stderr.splitlines()[0].startswith(f"{tmp_path}/deep/module.py:2: {problem}")
    assert len(found.stderr.splitlines()) == 1
    (tmp_path / "deep/module.py").write_text(f"{good}\n")
    assert lint(tmp_path).returncode == 0


def test_only_the_table_may_spell_a_name(tmp_path):
    (tmp_path / "table.py").write_text("NAME = 'experts.gate_up_proj'\n")
    assert lint(tmp_path).returncode == 0


def test_a_file_has_at_most_300_lines(tmp_path):
    (tmp_path / "module.py").write_text("x = 1\n" * 300)
    assert lint(tmp_path).returncode == 0
    (tmp_path / "module.py").write_text("x = 1\n" * 301)
    assert lint(tmp_path).stderr == f"{tmp_path}/module.py:1: the file has 301 lines: at most 300\n"
