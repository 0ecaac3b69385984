"""The names of a native directory's weight files say whether all are there."""

import shlex
import subprocess

import pytest

from gemma4_moe import convert, inspect
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError


@pytest.fixture
def native(source, tmp_path):
    convert(source, tmp_path / "nemo", max_shard_size=20_000)
    assert len(list((tmp_path / "nemo").glob("nemo-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "nemo/model.safetensors.index.json").exists()
    return tmp_path / "nemo"


def test_a_native_directory_needs_no_index(native):
    (native / "gemma4_moe.json").unlink()
    assert inspect(native).problems == ()


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_lost_file_is_named(number, native):
    lost = sorted(native.glob("nemo-*"))[number]
    lost.unlink()
    with pytest.raises(CheckpointFormatError, match="that the others count is not there") as caught:
        open_checkpoint(native)
    assert caught.value.facts["expected"] == lost.name


@pytest.mark.parametrize("name", ["stray.safetensors", "nemo-00001-of-00099.safetensors", "nemo.safetensors"])
def test_a_file_beyond_them_is_named_with_the_command_that_moves_it(name, native):
    (native / name).write_bytes(next(native.glob("nemo-*")).read_bytes())
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(native)
    if name == "nemo-00001-of-00099.safetensors":
        return  # two saves are mixed: which one is whole can't be told by one number
    assert caught.value.problem == "a safetensors file that the others do not count"
    for command in caught.value.hint.partition("elsewhere: ")[2].split(" && "):
        subprocess.run(shlex.split(command), check=True)
    assert inspect(native).problems == ()
