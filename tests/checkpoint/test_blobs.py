"""A damaged blob of the Hub's cache, by the hash that is its name; and quantised attention that no config tells."""

import hashlib
import shlex

import pytest
import torch

from gemma4_moe import convert, inspect, verify
from gemma4_moe.errors import CheckpointFormatError, UnsupportedCheckpointError
from support.checkpoints import flip_bit, write_checkpoint
from support.models import random_hf_state_dict

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def cached(source, tmp_path):
    """The source as the Hub's cache holds it: links to blobs that are named by their SHA-256."""
    place = tmp_path / "hub" / "models--google--gemma-4" / "snapshots" / ("0" * 40)
    blobs = place.parents[1] / "blobs"
    place.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        content = path.read_bytes()
        name = (
            hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(content).hexdigest()
        )
        (blobs / name).write_bytes(content)
        (place / path.name).symlink_to(f"../../blobs/{name}")
    return place


def test_a_sound_cache_is_accepted(cached, tmp_path):
    convert(cached, tmp_path / "nemo", sha256=True)
    assert not verify(cached, tmp_path / "nemo").different


def test_a_damaged_blob_is_found(cached, tmp_path):
    name = (cached / FIRST).resolve().name
    flip_bit(cached / FIRST, -3)
    with pytest.raises(CheckpointFormatError, match="Hub's cache is damaged") as caught:
        convert(cached, tmp_path / "hashed", sha256=True)
    assert caught.value.facts["file"] == str(cached / FIRST)
    assert caught.value.facts["expected"] == name
    assert caught.value.facts["found"] == hashlib.sha256((cached / FIRST).read_bytes()).hexdigest()
    words = shlex.split(caught.value.hint.partition(": ")[2])
    assert words == ["hf", "download", "google/gemma-4", FIRST, "--force-download"]
    assert not (tmp_path / "hashed").exists()
    convert(cached, tmp_path / "nemo")  # nothing was asked to be hashed
    with pytest.raises(CheckpointFormatError, match="Hub's cache is damaged"):
        verify(cached, tmp_path / "nemo")


@pytest.mark.parametrize("beside", ["absmax", "quant_state.bitsandbytes__nf4", "quant_map"])
def test_quantised_attention_without_a_quantization_config_is_refused(beside, tmp_path):
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    state = random_hf_state_dict()
    state |= {
        name: torch.full((50, 1), 7, dtype=torch.uint8),
        f"{name}.{beside}": torch.full((3,), 7, dtype=torch.uint8),
    }
    source = write_checkpoint(tmp_path / "hf", state)
    (problem,) = inspect(source).problems
    assert problem.form == "bitsandbytes"
    with pytest.raises(UnsupportedCheckpointError, match="bitsandbytes"):
        convert(source, tmp_path / "nemo")
