"""The page on JSON has a section for each command, with each field that the command gives and no other."""

import json
import re

import pytest

from gemma4_moe.cli.commands import cli
from support.adapters import native_config, random_native, scales_of, write_adapter
from support.checkpoints import write_checkpoint
from support.command import run
from support.documents import ROOT, rows
from support.models import random_hf_state_dict

PAGE = (ROOT / "docs/json.md").read_text()
SECTIONS = {section.split("\n")[0]: section for section in PAGE.split("\n## ")[1:]}

#: Fields whose own keys are names, such as those of modules.
OPEN = {"config", "groups", "inexact_casts", "dimensions"}


def fields(data):
    """The names of all fields, those of nested objects and lists too."""
    if isinstance(data, dict):
        return set(data).union(*(fields(value) for name, value in data.items() if name not in OPEN))
    return set().union(*map(fields, data)) if isinstance(data, list) else set()


def documented(heading):
    """The fields that a section names: all of the first column, and those in the second that are in backticks."""
    cells = [cell for row in rows(SECTIONS[heading]) if row[0].startswith("`") for cell in row]
    return {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}


def asked(*arguments, status=0):
    return json.loads(run(*arguments, "--format", "json", status=status).stdout)


def test_every_command_has_a_section():
    named = {word for heading in SECTIONS for word in heading.split(" and ")}
    assert set(cli.commands) <= named


def section_of(command):
    return next(heading for heading in SECTIONS if command in heading.split(" and "))


#: Words in backticks that are no field.
WORDS = {"E", "H", "I", "L", "convert", "inspect"}


@pytest.mark.parametrize(
    "line",
    [
        "inspect hf",
        "plan hf --mesh ep_shard=1,ep=2",
        "convert hf nemo",
        "convert hf nemo --dry-run",
        "clean lost",
        "demo",
    ],
)
def test_each_field_is_documented_and_no_other(line, source, tmp_path):
    command, *arguments = line.split()
    given = fields(asked(command, *(tmp_path / word if word in {"hf", "nemo", "lost"} else word for word in arguments)))
    whole = documented("plan" if "--dry-run" in line else section_of(command)) - WORDS
    assert given <= whole
    assert given == whole or "--dry-run" in line  # there is no mesh


def test_the_fields_of_an_adapter_are_documented(tmp_path):
    write_checkpoint(tmp_path / "base", random_hf_state_dict() | scales_of())
    write_adapter(tmp_path / "a", random_native(), native_config(), {})
    given = fields(asked("lora", tmp_path / "a", tmp_path / "b", "--to", "vllm", "--base", tmp_path / "base"))
    assert given == documented("lora") - WORDS
    given = fields(asked("inspect", tmp_path / "a", "--values"))
    assert given == documented("inspect of an adapter") - {"nemo", "peft", "vllm"}


def test_a_merge_has_the_fields_of_a_conversion(tmp_path):
    write_checkpoint(tmp_path / "base", random_hf_state_dict() | scales_of())
    write_adapter(tmp_path / "a", random_native(linear=()), native_config(), {"moe_rank_scaling": True})
    given = fields(asked("merge", tmp_path / "base", tmp_path / "a", tmp_path / "b"))
    assert given == documented("convert and merge") - WORDS


def test_the_fields_of_errors_are_documented(tmp_path, source):
    (source / "config.json").unlink()
    errors = [asked("convert", source, tmp_path / "nemo", status=3), asked("plan", tmp_path / "lost", status=3)]
    given = set().union(
        *map(fields, errors), *(fields(problem) for problem in asked("inspect", source, status=3)["problems"])
    )
    assert given <= documented("An error") | {"error"}
    assert {"kind", "problem", "file", "next"} <= given
