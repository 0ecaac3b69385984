"""Models of transformers, converted there and back on disk, compute the same."""

import pytest
import torch

from gemma4_moe import convert
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.sizes import parse_size
from support.formulas import assert_same_tensors, nemo_from_hf
from support.logits import TOLERANCE, difference
from support.models import read_directory, respell_as_legacy

KINDS = ["multimodal", "text"]
PREFIXES = {"multimodal": "model.language_model.layers.0.", "text": "model.layers.0."}


def load(model, directory):
    """`from_pretrained` in fp32 of the class of `model`, which must find every name and leave none over."""
    loaded, names = type(model).from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(names.values()), names
    return loaded


@pytest.mark.parametrize("spelling", ["current", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_computes_the_same_logits(kind, spelling, tmp_path):
    source = build_model(kind, layers=3, seed=1)
    save_model(source, tmp_path / "hf")
    published = read_directory(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    if spelling == "legacy":
        respell_as_legacy(tmp_path / "hf")
        assert PREFIXES[kind] + "moe.per_expert_scale" in read_directory(tmp_path / "hf")

    convert(tmp_path / "hf", tmp_path / "nemo")
    native = read_directory(tmp_path / "nemo")
    assert PREFIXES[kind] + "moe.experts.gate_and_up_projs" in native
    assert_same_tensors(native, nemo_from_hf(published))

    convert(tmp_path / "nemo", tmp_path / "back")
    back = read_directory(tmp_path / "back")
    assert sorted(back) == sorted(published)
    assert_same_tensors(nemo_from_hf(back), native)  # the norm after the experts hides a factor that all have in common
    assert difference(load(source, tmp_path / "back"), source) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_to_fp32_and_back_computes_the_same_logits(kind, tmp_path):
    source = build_model(kind, seed=2, dtype="bfloat16")
    save_model(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "nemo", dtype="float32")
    convert(tmp_path / "nemo", tmp_path / "back")
    assert difference(load(source, tmp_path / "back"), load(source, tmp_path / "hf")) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_nemo_to_hf_to_nemo_has_the_same_bits(kind, dtype, tmp_path):
    save_model(build_model(kind, seed=3, dtype=dtype), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(read_directory(tmp_path / "again"), read_directory(tmp_path / "nemo"))


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
def test_a_native_directory_is_refused_and_its_config_is_read(shard_size, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    save_model(build_model("multimodal"), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "nemo", max_shard_size=parse_size(shard_size))
    assert AutoConfig.from_pretrained(tmp_path / "nemo").model_type == "gemma4"
    with pytest.raises(OSError, match="no file named"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "nemo")
