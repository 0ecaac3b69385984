"""Directories of torch.distributed.checkpoint, written by torch and read without it."""

import json
import random
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from gemma4_moe import convert, inspect, plan, verify
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError, ConfigError, InputError, UnsupportedCheckpointError
from support.command import run
from support.descriptors import open_descriptors
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict, read_directory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(directory, state):
    dcp.save(state, storage_writer=FileSystemWriter(directory), no_dist=True)
    return directory


def optimizer_of(state):
    return {
        "state": {name: {"exp_avg": tensor, "step": torch.tensor(3.0)} for name, tensor in state.items()},
        "lr": 0.1,
    }


@pytest.fixture
def model():
    return random_hf_state_dict(H=40, I=24)


@pytest.mark.parametrize("layout", ["hf", "nemo"])
@pytest.mark.parametrize("shape", ["flat", "model", "app"])
def test_the_model_is_read_from_any_nesting_and_the_rest_is_left_out(layout, shape, model, tmp_path):
    state = model if layout == "hf" else nemo_from_hf(model)
    nested = {
        "flat": {**state, "optimizer": optimizer_of(state), "train_state": torch.tensor([4])},
        "model": {"model": state, "optim": optimizer_of(state), "epoch": 3},
        "app": {"app": {"weights": state, "lr_scheduler": {"base": 0.5}}},
    }[shape]
    before = open_descriptors()
    with open_checkpoint(save(tmp_path / "dcp", nested)) as checkpoint:
        assert sorted(checkpoint.tensors) == sorted(state)
        assert checkpoint.notes[0].startswith("left out: ")
        for name, tensor in state.items():
            stored = checkpoint.tensors[name]
            assert stored.shape == tuple(tensor.shape)
            assert stored.read().tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        checkpoint.check_unchanged()
    assert open_descriptors() == before


def test_convert_both_ways_with_the_config_of_the_base(source, tmp_path):
    published = read_directory(source)
    native = nemo_from_hf(published)
    save(tmp_path / "hf-dcp", {"model": published})
    save(tmp_path / "nemo-dcp", native)
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path / "hf-dcp")
    assert "--config-from BASE" in caught.value.hint
    convert(tmp_path / "hf-dcp", tmp_path / "nemo", config_from=source)
    assert_same_tensors(read_directory(tmp_path / "nemo"), native)
    assert verify(tmp_path / "hf-dcp", tmp_path / "nemo", config_from=source).different == ()
    convert(tmp_path / "nemo-dcp", tmp_path / "published", config_from=source, base=source)
    assert_same_tensors(read_directory(tmp_path / "published"), published)
    convert(tmp_path / "nemo-dcp", tmp_path / "ones", config_from=source)
    assert_same_tensors(read_directory(tmp_path / "ones"), hf_from_nemo(native))
    assert (tmp_path / "ones" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_command_reads_it_without_torch(source, tmp_path):
    directory = save(tmp_path / "dcp", {"model": read_directory(source), "step": 3})
    program = (
        "import sys; from gemma4_moe.cli.commands import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'pathlib._never' not in sys.modules"
    )
    import subprocess

    arguments = ["convert", str(directory), str(tmp_path / "nemo"), "--config-from", str(source)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "note: left out: 0 tensors and 1 other values that are not the model's: step" in done.stderr
    (next_command,) = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert "--config-from" in next_command
    run(*next_command.split()[2:])


def test_several_models_or_none_are_named(model, tmp_path):
    save(tmp_path / "two", {"ema": model, "live": model})
    with pytest.raises(UnsupportedCheckpointError, match="several models") as caught:
        open_checkpoint(tmp_path / "two")
    assert caught.value.facts["found"] == "ema, live"
    save(tmp_path / "none", {"optimizer": {"lr": torch.tensor(0.1)}})
    with pytest.raises(UnsupportedCheckpointError, match="no mixture-of-experts"):
        open_checkpoint(tmp_path / "none")


def test_a_transposed_view_is_refused_by_its_order(model, tmp_path):
    name = next(name for name in model if name.endswith("down_proj"))
    save(tmp_path / "dcp", model | {name: model[name].transpose(-1, -2).contiguous().transpose(-1, -2)})
    with pytest.raises(UnsupportedCheckpointError, match="another order"):
        open_checkpoint(tmp_path / "dcp")


def test_files_without_metadata_are_named(model, tmp_path):
    save(tmp_path / "dcp", model)
    (tmp_path / "dcp" / ".metadata").unlink()
    (problem,) = inspect(tmp_path / "dcp").problems
    assert problem.form == "torch.distributed.checkpoint without its metadata"


def test_a_lost_file_is_named(model, tmp_path):
    save(tmp_path / "dcp", model)
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointFormatError, match="missing"):
        open_checkpoint(tmp_path / "dcp")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_anywhere_is_an_error_of_ours_or_in_values_alone(name, model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    save(tmp_path / "dcp", {"model": model, "step": 3})
    path = tmp_path / "dcp" / name
    content = path.read_bytes()
    draw = random.Random(5)
    for _ in range(400):
        damaged = bytearray(content)
        at = draw.randrange(len(content))
        if draw.random() < 0.3:
            damaged = damaged[:at]
        else:
            damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            with open_checkpoint(tmp_path / "dcp") as checkpoint:
                for tensor in checkpoint.tensors.values():
                    tensor.read()
        except InputError:
            pass
