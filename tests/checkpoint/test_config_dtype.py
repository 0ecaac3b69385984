"""`--dtype` is said by config.json too: that field alone is another, every other byte is as it was."""

import json
import re

import pytest
import torch
import transformers

from gemma4_moe import convert, save_hf, verify
from gemma4_moe.checkpoint.config_dtype import with_dtype, without_quantisation
from gemma4_moe.demo.small_models import build_model, save_model
from support.checkpoints import write_checkpoint
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict, read_directory

NESTED = """{ "dtype" : "float32",
\t"text_config": {"dtype":"torch.float32", "note": "\\"dtype\\": \\"float32\\"", "rope": {"dtype": "float32"}},
  "vision_config":{"torch_dtype": "float16", "sizes": [1, {"dtype": "float32"}], "dtype": null},
  "quantization_config": {"dtype": "float32"}, "architectures": ["dtype"], "other": "dtype", "\\u0064type": "bfloat16" }
"""


def test_the_fields_of_the_document_and_of_its_models_alone_are_rewritten():
    expected = NESTED
    for old, new in (
        ('"dtype" : "float32"', '"dtype" : "bfloat16"'),
        ('"dtype":"torch.float32"', '"dtype":"bfloat16"'),
        ('"torch_dtype": "float16"', '"torch_dtype": "bfloat16"'),
    ):
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert with_dtype(NESTED.encode(), "bfloat16").decode() == expected


@pytest.mark.parametrize("text", ["{}", '{"dtype": "auto"}', '{"dtype": 3, "a": [{"dtype": "float32"}]}', '{"é": "ü"}'])
def test_what_names_no_dtype_stays(text):
    assert with_dtype(text.encode(), "float16") == text.encode()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"a": 1, "quantization_config": {"b": [{}, "}"]}, "c": 2}\n', '{"a": 1, "c": 2}\n'),
        ('{"quantization_config": {"ignore": ["a,b"]}, "c": 2}', '{ "c": 2}'),
        ('{\n  "é": 1,\n  "quantization_config": {}\n}\n', '{\n  "é": 1\n}\n'),
        ('{"quantization_config": null}', "{}"),
        ('{"text_config": {"compression_config": {}, "d": 1}, "e": 2}', '{"text_config": { "d": 1}, "e": 2}'),
        ('{"vision_config": {"quantization_config": {}}, "a": "quantization_config"}', None),
        ('["quantization_config", {"quantization_config": 1}]', None),
    ],
)
def test_the_fields_of_quantisation_are_left_out_and_no_other_byte(text, left):
    found = without_quantisation(text.encode()).decode()
    assert found == (text if left is None else left)
    json.loads(found)


@pytest.mark.parametrize("kind", ["multimodal", "text"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_reads_the_dtype_that_the_weights_have(kind, dtype, tmp_path):
    save_model(build_model(kind, dtype="float32"), tmp_path / "hf")
    raw = (tmp_path / "hf" / "config.json").read_text()
    assert '"float32"' in raw
    convert(tmp_path / "hf", tmp_path / "nemo", dtype=dtype)
    assert not verify(tmp_path / "hf", tmp_path / "nemo").different
    assert not verify(tmp_path / "nemo").wrong
    written = (tmp_path / "nemo" / "config.json").read_text()
    assert written == re.sub(r'("dtype": )"float32"', rf'\1"{dtype}"', raw)
    convert(tmp_path / "nemo", tmp_path / "back")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert config.dtype == getattr(torch, dtype)
    (tmp_path / "nemo" / "config.json").write_text(raw)
    (difference,) = verify(tmp_path / "hf", tmp_path / "nemo").different
    assert (difference.name, difference.kind) == ("config.json", "file")
    assert dtype in difference.expected


def test_without_a_cast_and_for_a_cast_to_the_same_dtype(tmp_path):
    state = random_hf_state_dict(dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "hf", state)
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}  # stale
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    convert(source, tmp_path / "said", dtype="bfloat16")
    assert json.loads((tmp_path / "said" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    for target in ("kept", "said"):
        assert not verify(source, tmp_path / target).different


def test_a_sharded_save_says_its_dtype_too(tmp_path):
    save_model(build_model("text", dtype="float32"), tmp_path / "hf")
    native = nemo_from_hf(read_directory(tmp_path / "hf"))
    save_hf(native, tmp_path / "saved", config_from=tmp_path / "hf", dtype="bfloat16")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    save_hf(native, tmp_path / "own", config_from=tmp_path / "hf")
    assert (tmp_path / "own" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
