"""The threads of a load: every job once, errors and interrupts end all of them, slots are not mixed up."""

import threading
import time

import pytest
import torch

from gemma4_moe import load_hf
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.converter.blocks import LOAD_BLOCKS
from gemma4_moe.errors import CheckpointFormatError
from gemma4_moe.layout.dtypes import named
from gemma4_moe.model_io.pipeline import Job, Pipeline
from support.checkpoints import write_checkpoint
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict

CPU = torch.device("cpu")


class Stored:
    """A tensor of int32 whose values are their positions."""

    dtype = named("int32")

    def read_into(self, destination, offset):
        time.sleep(0.001 * (offset % 3))
        values = torch.arange(offset // 4, (offset + len(destination)) // 4, dtype=torch.int32)
        destination[:] = values.view(torch.uint8).numpy().data


def jobs(count, install, size=40):
    return (Job(Stored(), number * size, size, CPU, install) for number in range(count))


def test_every_job_is_installed_once_from_its_own_bytes():
    seen, threads = [], set()

    def install(values):
        threads.add(threading.get_ident())
        first = values.clone()
        time.sleep(0.001)
        assert torch.equal(values, first)  # no other job reads into the slot
        seen.extend(values.tolist())

    assert Pipeline(40, {CPU}).run(jobs(200, install)) == 200 * 40
    assert sorted(seen) == list(range(2000))
    assert 1 < len(threads) <= LOAD_BLOCKS


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_ends_all_threads(error):
    begun = []

    def install(values):
        begun.append(1)
        if values[0] == 50:
            raise error("at 50")

    with pytest.raises(error, match="at 50"):
        Pipeline(40, {CPU}).run(jobs(20_000, install))
    assert len(begun) < 1000


def test_a_truncated_file_is_named(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    model = {name: torch.zeros_like(tensor) for name, tensor in nemo_from_hf(random_hf_state_dict()).items()}
    reads = OpenFile.read_into
    largest = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def cut_off(self, offset, destination):
        if len(destination) > 100 and self.path == largest:
            with largest.open("r+b") as file:
                file.truncate(2000)
        return reads(self, offset, destination)

    monkeypatch.setattr(OpenFile, "read_into", cut_off)
    with pytest.raises(CheckpointFormatError, match="truncated") as caught:
        load_hf(model, source)
    assert str(largest) in str(caught.value)


def test_loads_in_several_blocks_have_the_formulas_bits(tmp_path, small_blocks):
    hf = random_hf_state_dict(layers=3, E=6, H=40, I=24)
    source = write_checkpoint(tmp_path / "hf", hf)
    expected = nemo_from_hf(hf)
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    load_hf(model, source)
    assert_same_tensors(model, expected)
