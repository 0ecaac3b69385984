"""`--help`: every command explains its arguments, nothing is cut, and each example runs as printed."""

import re
import shlex
import shutil

import click
import pytest
from click.testing import CliRunner

from gemma4_moe import convert, convert_lora
from gemma4_moe.cli.commands import cli
from gemma4_moe.cli.exit_statuses import EXIT_STATUSES
from gemma4_moe.demo.small_models import build_model, save_model
from support.adapters import native_config, random_native, write_adapter
from support.command import run
from support.steps import write_step

COMMANDS = list(cli.commands)


def help_of(*command):
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="gemma4-moe", terminal_width=80)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_nothing_is_cut(command):
    text = help_of(*command).replace("[ARGS]...", "").replace("DIM=RANKS,...", "")
    assert "..." not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained_and_every_option_has_a_text(name):
    command = cli.commands[name]
    text = help_of(name)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
        else:
            argument = parameter.make_metavar(click.Context(command)).strip("[]")
            assert re.search(rf"^Arguments:\n(  .*\n)*  {argument}  +\S", text, re.M), argument


def test_the_exit_statuses_are_printed():
    text = " ".join(help_of().split("Exit status:")[1].split())
    assert all(f"{status} {meaning}" in text for status, meaning in EXIT_STATUSES.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small checkpoints under the names that the examples use."""
    models = tmp_path_factory.mktemp("models")
    (models / "google").mkdir()
    for name in ("gemma-4-26B-A4B", "google/gemma-4-26B-A4B"):
        save_model(build_model(), models / name)
    convert(models / "gemma-4-26B-A4B", models / "gemma-4-nemo")
    convert(models / "gemma-4-nemo", models / "gemma-4-hf", base=models / "gemma-4-26B-A4B")
    write_step(models / "checkpoints/epoch_0_step_7", models / "gemma-4-26B-A4B", 2)
    (models / "checkpoints/LOWEST_VAL").symlink_to("epoch_0_step_7")
    (models / "step-1000").mkdir()
    write_adapter(
        models / "step-1000/model",
        random_native(H=64, I=24, r=5, linear=[("mlp.down_proj", 64, 40)]),
        native_config(),
        {},
    )
    convert_lora(models / "step-1000/model", models / "adapter-peft", to="peft", base=models / "gemma-4-26B-A4B")
    return models


def examples(*command):
    match = re.search(r"^Examples:\n((?:  .*\n)+)", help_of(*command), re.M)
    assert match is not None, f"no examples of {command}"
    return [line.strip() for line in match[1].splitlines()]


@pytest.mark.parametrize("example", sorted({*examples(), *(line for name in COMMANDS for line in examples(name))}))
def test_each_example_runs_as_printed(example, models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    program, command, *arguments = shlex.split(example.replace("ep=8", "ep=3"))  # the small models have six experts
    assert program == "gemma4-moe"
    if command in ("convert", "lora"):
        shutil.rmtree(tmp_path / arguments[1], ignore_errors=True)
    run(command, *arguments, cwd=tmp_path)
