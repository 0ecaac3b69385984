"""The page on differences names every field that `verify` and `diff` give as JSON."""

import re
from pathlib import Path

import torch

from gemma4_moe import convert, verify
from gemma4_moe.cli import report
from support.checkpoints import flip_bit
from support.models import read_directory
from support.verification import checked

PAGE = (Path(__file__).parents[2] / "docs/differences.md").read_text()


def fields(data):
    """The names of all fields, those of nested objects and lists too."""
    if isinstance(data, dict):
        return set(data).union(*map(fields, data.values()))
    return set().union(*map(fields, data)) if isinstance(data, list | tuple) else set()


def test_every_field_is_documented_and_no_other(source, tmp_path):
    state = read_directory(source)
    other = state | {name: tensor + 1 for name, tensor in state.items() if tensor.dtype == torch.bfloat16}
    compared = report.verification(checked(tmp_path, state, other)).data
    convert(source, tmp_path / "nemo")
    flip_bit(tmp_path / "nemo/nemo.safetensors", -1)
    rechecked = report.recheck(verify(tmp_path / "nemo")).data
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", PAGE, re.M)
    named = {word for row in rows for cell in row for word in re.findall(r"`(\w+)`", cell)}
    kinds = {"missing", "extra", "shape", "dtype", "values", "fold", "file", "diff"}
    assert fields(compared) | fields(rechecked) == named - kinds
