"""The README and the documents: commands and snippets run as printed, and every link, path and name exists."""

import importlib
import re
import shlex
import tomllib

import pytest

from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.layout.table import RULES
from support.command import run
from support.documents import DOCUMENTS, ROOT, blocks
from support.hub_server import environment, serving
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

README = (ROOT / "README.md").read_text()

#: The command's program, told that 100 GB are free.
WITH_SPACE = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda _: SimpleNamespace(free=100_000_000_000)
from gemma4_moe.cli.commands import main
main()
"""

#: Folders of the repository: a word in backticks that begins with one of them is a path.
FOLDERS = ("docs", "src", "tests", "tests_vllm", "benchmarks", "examples", "cpp", ".ci")


def commands():
    """Each command of the README's consoles, and the lines below it."""
    found = []
    for line in "".join(blocks(README, "console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


@pytest.fixture
def hub(tmp_path):
    """A Hub that has the real model's headers, for the command in a process of its own."""
    write_sparse_checkpoint(tmp_path / "published", real_names_and_shapes(), BFLOAT16, real_config())
    with serving("google/gemma-4-26B-A4B", tmp_path / "published") as hub:
        yield environment(hub, tmp_path)


def normal(line):
    """A line without sizes, versions, measured differences and the width of its columns."""
    line = re.sub(r"\d\.\d+e-\d+|transformers [\d.]+|[\d.]+ (?:[kMGT]?B)\b|\d{1,3}(?:,\d{3})+", "#", line)
    return " ".join(re.sub("─+", "─", line).split())


def test_the_consoles_show_what_the_commands_print(hub, tmp_path):
    """In the README's order, in an empty directory: later commands read what earlier ones wrote."""
    place = tmp_path / "place"
    place.mkdir()
    for command, shown in commands():
        program, *arguments = shlex.split(command)
        assert program == "gemma4-moe"
        done = run(*arguments, cwd=place, program=WITH_SPACE, **hub)
        printed = "\n".join(filter(None, map(normal, (done.stdout + done.stderr).splitlines())))
        wanted = [normal(line) for line in shown if line.strip()]
        pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in wanted)
        ended = "" if wanted[-1] != "..." else r"(?:.*\n)*"
        last = "(?:next: .*\n)?"  # the one line of stderr that a listing may leave out
        assert re.fullmatch(pattern + ended + last, printed + "\n"), f"{command}\n{printed}\nis not\n{wanted}"


def test_the_snippets_run_as_printed(tmp_path, monkeypatch):
    class Engine:
        def load_weights(self, weights):
            self.loaded = dict(weights)

    save_model(build_model(), tmp_path / "gemma-4-26B-A4B")
    monkeypatch.chdir(tmp_path)
    names, engine = {}, Engine()
    for snippet in blocks(README, "python"):
        fitting = snippet.replace("ep_shard=2,ep=8", "ep_shard=2,ep=3")  # the small model has six experts
        exec(compile(fitting, "README.md", "exec"), names)
    native, adapter = names["native"], names["adapter"]
    names["on_each_rank"](native)
    names["train"](native, adapter, engine, steps=2)
    assert {"gemma-4-nemo", "step-1000"} <= {path.name for path in tmp_path.iterdir()}
    assert engine.loaded.keys() <= names["published"].keys()
    assert len(engine.loaded) == 63


def test_the_installation_names_extras_and_targets_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", README) for extra in group.split(",")}
    assert named
    assert named <= extras.keys()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        assert set(re.findall(r"(?:^|`)make ([\w-]+)", document.read_text(), re.M)) <= targets, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_path_and_module_exists(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or (document.parent / link).exists(), link
    slugs = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall("^#+ (.*)", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= slugs
    for word in re.findall(r"`([^`\s]+)`", text):
        if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            assert list(ROOT.glob(word)), word
        elif re.fullmatch(r"gemma4_moe(\.\w+)+(\(.*\))?", word) and word != "gemma4_moe.json":
            assert named(word.partition("(")[0]), word


def named(word):
    """What a dotted name means, or an error."""
    try:
        return importlib.import_module(word)
    except ModuleNotFoundError:
        parent, _, name = word.rpartition(".")
        return getattr(named(parent), name)


def test_each_promise_and_each_row_beside_other_tools_names_its_test():
    for heading in ("## What is promised", "## Beside other tools"):
        rows = [line for line in README.split(heading)[1].split("\n## ")[0].splitlines() if line.startswith("| ")]
        assert len(rows) > 3
        for row in rows[1:]:
            assert re.search(r"\]\(tests/\S+\.py\)", row.rstrip("|").rpartition(" | ")[2]), row


def test_the_table_of_names_is_that_of_the_code():
    """Names and axes; E, H and I as the README explains them."""
    listed = set()
    for row in re.findall(r"^\| `(?:experts|router)\..*", README, re.M):
        cells = row.split("|")[1:5]
        hf, hf_axes, nemo, nemo_axes = (re.findall(r"\[.*?\]|[\w.]+(?=`)", cell) for cell in cells)
        listed |= set(zip(hf, hf_axes, nemo or [None], nemo_axes or hf_axes, strict=True))
    expected = set()
    for rule in RULES:
        hf_axes, nemo_axes = (f"[{', '.join(axes)}]" for axes in (rule.hf_axes, rule.nemo_axes or rule.hf_axes))
        expected.add((rule.hf, hf_axes, rule.nemo if rule.in_nemo else None, nemo_axes))
    assert listed == expected


def test_every_page_is_linked():
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", README))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == linked


def test_no_count_of_tests_is_quoted():
    assert not re.search(r"\d+ (?:tests|passed)\b", README)
