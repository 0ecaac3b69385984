"""`inspect`: what a checkpoint is and what is wrong with it, without a byte of any tensor."""

import pytest

from gemma4_moe import convert, inspect
from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.errors import IncompleteExpertsError, UnsupportedCheckpointError
from gemma4_moe.layout import Layout
from support.checkpoints import write_checkpoint
from support.models import random_hf_state_dict

E, H, I, LAYERS = 3, 10, 7, 2  # noqa: E741


@pytest.fixture
def state():
    return random_hf_state_dict(E=E, H=H, I=I, layers=LAYERS)


def test_sizes_and_bytes_are_those_of_the_tensors(state, tmp_path):
    found = inspect(write_checkpoint(tmp_path / "hf", state))
    assert (found.layout, found.spelling, found.model_type) == (Layout.HF, "current", "gemma4")
    assert found.sizes == {"E": E, "H": H, "I": I, "L": LAYERS}
    assert (found.tensors, found.bytes) == (len(state), sum(tensor.nbytes for tensor in state.values()))
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    experts = LAYERS * 3 * E * H * I * 2  # gate, up and down, in bf16
    router = LAYERS * (E * H + H + E) * 2  # the scale of the experts is the router's
    assert (found.groups["experts"], found.groups["router"]) == (experts, router)
    assert sum(found.groups.values()) == found.bytes
    assert found.problems == ()


def test_no_tensor_is_read(state, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "hf", state)
    convert(source, tmp_path / "nemo")
    read, read_into = 0, SafetensorsFile.read_into

    def counted(self, offset, destination):
        nonlocal read
        read += destination.nbytes
        read_into(self, offset, destination)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    for directory, layout in ((source, Layout.HF), (tmp_path / "nemo", Layout.NEMO)):
        headers = 0
        for file in directory.glob("*.safetensors"):
            headers += 8 + int.from_bytes(file.read_bytes()[:8], "little")
        read = 0
        assert inspect(directory).layout is layout
        assert headers <= read <= headers + 8 * 2  # the length may be read once more with its header


def test_every_problem_is_listed(state, tmp_path):
    del state["model.language_model.layers.0.router.per_expert_scale"]
    del state["model.language_model.layers.1.experts.down_proj"]
    found = inspect(write_checkpoint(tmp_path / "hf", state))
    assert any(isinstance(problem, IncompleteExpertsError) for problem in found.problems)
    text = "\n".join(map(str, found.problems))
    assert "per_expert_scale" in text
    assert "down_proj" in text


def test_a_wrong_total_size_is_noted_and_is_right_in_the_target(state, tmp_path):
    source = write_checkpoint(tmp_path / "hf", state)
    index = source / "model.safetensors.index.json"
    own = sum(tensor.nbytes for tensor in state.values())
    index.write_text(index.read_text().replace(f'"total_size": {own}', '"total_size": 1234'))
    note = f"total_size in {index.name} is 1,234, and the tensors have {own:,} bytes"
    found = inspect(source)
    assert found.problems == ()
    assert note in found.notes
    assert convert(source, tmp_path / "nemo", max_shard_size="1KB").notes == (note,)
    assert inspect(tmp_path / "nemo").notes == found.notes[1:]


def test_a_foreign_format_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = inspect(tmp_path)
    assert (found.layout, found.spelling, found.tensors) == (None, "GGUF", 0)
    assert [type(problem) for problem in found.problems] == [UnsupportedCheckpointError]
