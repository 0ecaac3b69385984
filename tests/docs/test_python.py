"""docs/python.md: every public name and every result is in its table, and a result's repr fits on a screen."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import gemma4_moe
from gemma4_moe import convert, diff, inspect, plan, verify
from gemma4_moe.layout.dtypes import BFLOAT16
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text()
RESULTS = sorted(set(re.findall(r"^\| `\w+\(.*?\)` \| `gemma4_moe\.([\w.]+)`", PAGE, re.M)))


def test_every_public_name_is_in_the_table():
    listed = set(re.findall(r"^\| `(\w+)", PAGE, re.M))
    assert listed == set(gemma4_moe.__all__) - {"__version__"}


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_a_frozen_dataclass_whose_fields_are_explained(name):
    module, _, name = name.rpartition(".")
    result = getattr(importlib.import_module(f"gemma4_moe.{module}"), name)
    assert result.__dataclass_params__.frozen
    for field in dataclasses.fields(result):
        assert re.search(rf"^ +{field.name}: ", result.__doc__, re.M), field.name


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    directory = tmp_path_factory.mktemp("real") / "gemma-4-26B-A4B"
    write_sparse_checkpoint(directory, real_names_and_shapes(), BFLOAT16, real_config())
    return directory


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (inspect, ["gemma-4-26B-A4B", "hf (current)", "1,013 tensors", "51.61 GB", "0 problems"]),
        (lambda real: plan(real), ["gemma-4-26B-A4B", "hf (current), 1,013 tensors", "nemo, 983 tensors, 11 files"]),
        (lambda real: plan(real, mesh="ep_shard=2,ep=8").mesh, ["ep_shard 2, ep 8", "16 ranks", "9.06 GB"]),
    ],
)
def test_a_result_of_the_real_model_fits_on_a_screen(call, words, real):
    assert_fits(call(real), words)


def test_a_comparison_fits_on_a_screen(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    other = write_checkpoint(tmp_path / "other", random_hf_state_dict(seed=1))
    assert_fits(diff(source, other), [str(other), "17 tensors, 0 equal, 17 different"])
    done = convert(source, tmp_path / "nemo")
    planned = f"<Plan hf (current) → nemo, 15 tensors, 1 files, {done.plan.target_bytes / 1000:.2f} kB>"
    assert repr(done) == f"<Conversion into {tmp_path / 'nemo'}, 0 notes: {planned}>"
    name, router = next((name, tensor) for name, tensor in done.plan.tensors.items() if "gate.proj" in name)
    assert repr(router) == f"<Target {name}: bfloat16 {list(router.shape)}, keep>"
    assert_fits(verify(source, tmp_path / "nemo"), ["15 tensors, 15 equal, 0 different"])
    found = verify(tmp_path / "nemo")
    assert (
        repr(found)
        == f"<Recheck of {tmp_path / 'nemo'}: {found.files} files, {found.nbytes / 1000:.2f} kB, 0 different>"
    )


def assert_fits(result, words):
    text = repr(result)
    assert len(text.splitlines()) <= 20
    assert len(text) <= 20 * 100
    assert all(word in text for word in words), text
