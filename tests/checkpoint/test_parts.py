"""Tensors in parts: any ranges of bytes of any boxes, and each way in which parts can't be one tensor."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gemma4_moe import convert, plan
from gemma4_moe.checkpoint import parts
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError, ConfigError, DuplicateTensorError, InputError, TensorShapeError
from support.checkpoints import config_of
from support.descriptors import open_descriptors
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory
from support.steps import cut, spread, write_parts, write_step

GATE_UP = "model.language_model.layers.1.experts.gate_up_proj"


@st.composite
def cut_tensors(draw):
    """A shape of up to four axes, and where each axis is cut."""
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    cuts = [(axis, *draw(st.sets(st.integers(1, size), max_size=3))) for axis, size in enumerate(shape)]
    return shape, [(axis, *(at for at in where if at < shape[axis])) for axis, *where in cuts]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_tensors(), st.randoms(use_true_random=False), st.sampled_from([1, 16, 2**20]))
def test_any_range_of_any_parts_reads_as_the_whole(tmp_path_factory, monkeypatch, given, random, at_once):
    monkeypatch.setattr(parts, "_RUNS_BYTES", at_once)
    shape, cuts = given
    whole = torch.from_numpy(np.random.default_rng(1).integers(0, 2**15, shape, np.int16))
    boxes = list(cut(whole, *cuts))
    random.shuffle(boxes)
    directory = tmp_path_factory.mktemp("parts")
    write_parts(directory, [{"a": box} for box in boxes])
    (directory / "config.json").write_text("{}")
    with open_checkpoint(directory) as checkpoint:
        tensor = checkpoint.tensors["a"]
        assert tensor.shape == tuple(shape)
        content = whole.numpy().tobytes()
        assert tensor.read().tobytes() == content
        for _ in range(20):
            start, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
            found = bytearray(end - start)
            tensor.read_into(memoryview(found), start)
            assert found == content[start:end]
            reader = tensor.file.quickest_reader()
            buffer = memoryview(bytearray(end - start + parts_slack()))
            assert bytes(reader.read(tensor.start + start, end - start, buffer)) == content[start:end]
            reader.close()


def parts_slack():
    from gemma4_moe.checkpoint.readers import SLACK

    return SLACK


def test_a_step_has_the_tensors_and_side_files_of_its_checkpoint(source, tmp_path):
    model = write_step(tmp_path / "step", source, 3, experts_on_axis_1=2)
    before = open_descriptors()
    with open_checkpoint(source) as whole, open_checkpoint(model) as checkpoint:
        assert checkpoint.read_config().document == whole.read_config().document
        assert [file.parent.name for file in checkpoint.side_files] == [".hf_metadata"] * 2
        assert checkpoint.skipped == ("consolidate.sh",)
        assert sorted(checkpoint.tensors) == sorted(whole.tensors)
        for name, tensor in whole.tensors.items():
            joined = checkpoint.tensors[name]
            assert (joined.shape, joined.dtype, joined.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
            assert joined.read().tobytes() == tensor.read().tobytes()
        checkpoint.check_unchanged()
    assert open_descriptors() == before


def refusal(directory, files, error):
    state = random_hf_state_dict()
    write_parts(directory, files)
    (directory / "config.json").write_text(json.dumps(config_of(state)))
    with pytest.raises(error) as caught:
        open_checkpoint(directory)
    return caught.value


def whole_config():
    """A config that says all shapes, and the state of its model."""
    from gemma4_moe.demo.small_models import build_model

    model = build_model("text")
    config = model.config.to_dict() | {"model_type": "gemma4_text"}
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return json.loads(json.dumps(config, default=str)), state


@pytest.mark.parametrize("lost", [0, 2])
def test_a_missing_part_is_found_by_the_config_even_the_last(lost, tmp_path):
    config, state = whole_config()
    ranks = spread(state, 3)
    del ranks[lost]["model.layers.1.experts.down_proj"]
    write_parts(tmp_path, ranks)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="parts of a tensor are missing") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.facts["tensor"] == "model.layers.1.experts.down_proj"
    assert caught.value.facts["expected"].endswith("elements of [6, 64, 24], as config.json calls for")
    assert "in 2 parts" in caught.value.facts["found"]


def test_overlapping_parts_are_named_with_both_files(tmp_path):
    whole = random_hf_state_dict()[GATE_UP]
    files = [{GATE_UP: ([0, 0, 0], whole[:4])}, {GATE_UP: ([3, 0, 0], whole[3:])}]
    error = refusal(tmp_path, files, DuplicateTensorError)
    assert "shard-00001" in error.facts["found"]
    assert "shard-00002" in error.facts["found"]


def test_the_same_scalar_twice_overlaps(tmp_path):
    refusal(tmp_path, [{"a": ([], torch.tensor(2.0))}] * 2, DuplicateTensorError)


def test_parts_of_different_dtypes_are_named(tmp_path):
    whole = random_hf_state_dict()[GATE_UP]
    files = [{GATE_UP: ([0, 0, 0], whole[:4])}, {GATE_UP: ([4, 0, 0], whole[4:].float())}]
    error = refusal(tmp_path, files, TensorShapeError)
    assert error.facts["found"] == "float32, 3 axes"


def test_a_hole_is_found_without_a_config_that_says_the_shape(tmp_path):
    whole = torch.arange(12.0)
    error = refusal(tmp_path, [{"a": ([0], whole[:5])}, {"a": ([6], whole[6:])}], CheckpointFormatError)
    assert error.facts["expected"] == "12 elements of [12]"


@pytest.mark.parametrize(
    "info", ["{}", '{"a": 3}', '{"a": {"saved_offsets": [0, 0]}}', '{"a": {"saved_offsets": [-1]}}', "[", None]
)
def test_offsets_that_torch_does_not_write_are_refused(info, tmp_path):
    metadata = {"format": "pt"} if info is None else {"DCP_SHARDING_INFO": info}
    write_parts(tmp_path, [{"b": ([0], torch.arange(3.0))}])
    save_file({"a": torch.arange(3.0)}, tmp_path / "shard-00002-model-00001-of-00001.safetensors", metadata)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointFormatError):
        open_checkpoint(tmp_path)


def test_parts_without_a_config_take_that_of_another_checkpoint(source, tmp_path):
    state = read_directory(source)
    whole, lost = spread(state, 3), spread(state, 3)
    del lost[2][GATE_UP]
    write_parts(tmp_path / "whole", whole)
    write_parts(tmp_path / "lost", lost)
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path / "whole", to="nemo")
    assert "--config-from" in caught.value.hint
    convert(tmp_path / "whole", tmp_path / "nemo", config_from=source)
    assert_same_tensors(read_directory(tmp_path / "nemo"), nemo_from_hf(state))
    with pytest.raises(InputError):
        plan(tmp_path / "lost", config_from=source)
