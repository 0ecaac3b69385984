"""Every command of the documents is one that the installed package has, with options that it has."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gemma4_moe import convert
from gemma4_moe.cli.commands import cli
from support.checkpoints import contents
from support.documents import DOCUMENTS, ROOT, blocks, without_blocks

#: Options in the text that are those of a benchmark, and of MLX.
OTHERS = {"--fresh-memory", "--quantize"}


def typed(text):
    """The lines that are typed in the blocks of commands of a text."""
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"^\$ (.*)", "".join(blocks(text, "console")), re.M)


def quoted(text):
    """The texts in backticks."""
    return [" ".join(word.split()) for word in re.findall(r"`([^`]+)`", without_blocks(text))]


def of(program, words):
    """The arguments of those commands that call a program."""
    return [words for line in words if (words := shlex.split(line))[:1] == [program]]


def parse(words, *, whole=True):
    """Let click parse the arguments of `gemma4-moe`; a command that is not whole may lack arguments."""
    try:
        context = cli.make_context("gemma4-moe", list(words))
        for name in sorted(cli.commands) if words[0] == "COMMAND" else words[:1]:
            cli.commands[name].make_context(name, list(words[1:]), parent=context).close()
    except click.exceptions.Exit:
        assert {"--help", "--version"} & set(words)
    except click.MissingParameter:
        assert not whole, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(document):
    text = document.read_text()
    for words in of("gemma4-moe", typed(text)):
        parse(words[1:])
    for words in of("gemma4-moe", [word for word in quoted(text) if word.startswith("gemma4-moe ")]):
        parse(words[1:], whole=False)


@pytest.mark.parametrize(
    "wrong", ["convrt a b", "convert a b --resum", "convert a b --to gguf", "convert a", "verify a b c", "--hlp"]
)
def test_a_command_that_does_not_parse_is_noticed(wrong):
    with pytest.raises((click.UsageError, KeyError, AssertionError)):
        parse(wrong.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_in_the_text_exists(document):
    ours = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    named = {word for word in quoted(document.read_text()) if re.fullmatch(r"--[a-z][a-z-]*", word)}
    assert named - OTHERS <= ours | {"--help", "--version"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_launch_names_a_module_of_the_package(document):
    from torch.distributed.run import get_args_parser

    text = document.read_text()
    lines = typed(text) + [word for word in quoted(text) if word.startswith(("python ", "torchrun "))]
    for _, *words in of("python", lines) + of("python3", lines):
        if words[0] == "-m" and words[1].startswith("gemma4_moe"):
            assert importlib.util.find_spec(words[1]), words
    for _, *words in of("torchrun", lines):
        options = get_args_parser().parse_args(words)
        if not options.module:
            assert (ROOT / options.training_script).exists(), words
        else:
            assert importlib.util.find_spec(options.training_script), words
            if options.training_script == "gemma4_moe":
                parse(options.training_script_args)


def test_torchrun_converts_as_typed(source, tmp_path):
    launches = of("torchrun", typed((ROOT / "docs/it-failed.md").read_text()))
    (launch,) = (words for words in launches if "--standalone" in words)
    places = {"SRC": str(source), "DST": str(tmp_path / "nemo"), "4": "2"}
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [places.get(word, word) for word in launch], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("target ") == 1
    convert(source, tmp_path / "alone")
    assert contents(tmp_path / "nemo") == contents(tmp_path / "alone")
