"""A save that would publish a faulty model is refused before anything is written; mended, it is whole."""

import json

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration

from gemma4_moe import save_hf, verify
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.errors import ConfigError, DuplicateTensorError, InputError, TensorShapeError, UnknownTensorError
from gemma4_moe.target.manifest import read_manifest
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import read_directory

CLASSES = {"multimodal": Gemma4ForConditionalGeneration, "text": Gemma4ForCausalLM}
TEXT, WHOLE = "model.", "model.language_model."


@pytest.fixture(scope="module", params=[True, False], ids=["with weights", "config alone"])
def published(request, tmp_path_factory):
    """Directories of both kinds, with their weights or with the config alone."""
    root = tmp_path_factory.mktemp("published")
    for kind in CLASSES:
        save_model(build_model(kind, seed=4), root / kind)
        if not request.param:
            for path in (root / kind).glob("*.safetensors*"):
                path.unlink()
    return root


def native(kind, seed=7):
    state = build_model(kind, seed=seed).state_dict()
    return nemo_from_hf({name: tensor for name, tensor in state.items() if name != "lm_head.weight"})


def text_only(state):
    return {name.replace(WHOLE, TEXT): t for name, t in state.items() if name.startswith(WHOLE)}


def without(*parts):
    return lambda state: {name: t for name, t in state.items() if not any(part in name for part in parts)}


def added(name, tensor):
    return lambda state: state | {name: tensor}


def reshaped(state):
    name = f"{WHOLE}layers.1.mlp.up_proj.weight"
    return state | {name: state[name][:-1]}


def of_dtype(dtype):
    def changed(state):
        name = f"{WHOLE}layers.0.self_attn.q_proj.weight"
        return state | {name: state[name].to(dtype)}

    return changed


FAULTS = {
    "text-only names": (
        text_only,
        UnknownTensorError,
        r"model\.layers\.\{0\.\.\.1\}.*text-only names under a multimodal",
    ),
    "no vision tower": (without("vision_tower"), InputError, r"missing.*model\.vision_tower\..*allow_partial=True"),
    "no layer scalar": (without("layer_scalar"), InputError, r"missing.*layers\.\{0\.\.\.1\}\.layer_scalar \(2\)"),
    "no embedding": (without("embed_tokens"), InputError, r"missing.*embed_tokens\.weight"),
    "no attention in one layer": (without("layers.1.self_attn"), InputError, r"missing.*layers\.1\.self_attn\.q_proj"),
    "a layer too few": (without("layers.1."), InputError, r"Incomplete expert weights: no tensor of 1 layers"),
    "an unknown parameter": (
        added("model.adapter.weight", torch.ones(2)),
        UnknownTensorError,
        r"model\.adapter\.weight",
    ),
    "another shape": (reshaped, TensorShapeError, r"another shape.*layers\.1\.mlp\.up_proj.*\[40, 64\].*\[39, 64\]"),
    "float8": (of_dtype(torch.float8_e4m3fn), TensorShapeError, r"no weight is loaded.*q_proj.*float8_e4m3fn"),
    "complex": (of_dtype(torch.complex64), TensorShapeError, r"no weight is loaded.*q_proj.*complex64"),
    "two names that become one": (
        added(f"module.{WHOLE}norm.weight", torch.ones(64)),
        DuplicateTensorError,
        r"become one",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name_before_anything_is_written(fault, published, tmp_path):
    change, error, words = FAULTS[fault]
    with pytest.raises(error, match=f"(?s){words}"):
        save_hf(change(native("multimodal")), tmp_path / "saved", config_from=published / "multimodal")
    assert not list(tmp_path.iterdir())


def test_names_of_a_multimodal_model_under_a_text_config(published, tmp_path):
    with pytest.raises(UnknownTensorError, match=r"(?s)names of a multimodal model.*model_type gemma4"):
        save_hf(native("multimodal"), tmp_path / "saved", config_from=published / "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name,
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    ],
    ids=["plain", "compiled", "DDP", "checkpointed"],
)
def test_a_whole_model_is_clean_wrapped_or_not(kind, wrap, published, tmp_path):
    state = native(kind)
    save_hf({wrap(name): t for name, t in state.items()}, tmp_path / "saved", config_from=published / kind)
    assert not verify(tmp_path / "saved").wrong
    expected = hf_from_nemo(state)
    assert_same_tensors(read_directory(tmp_path / "saved"), expected)
    loaded, keys = CLASSES[kind].from_pretrained(tmp_path / "saved", output_loading_info=True, dtype=torch.float32)
    assert not any(keys.values()), keys
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
    assert_same_tensors(found, {name: tensor.float() for name, tensor in expected.items()})


def test_a_part_says_in_the_manifest_what_is_missing(published, tmp_path):
    part = without("vision_tower", "layers.0.")(native("multimodal"))
    saved = save_hf(part, tmp_path / "saved", config_from=published / "multimodal", allow_partial=True)
    assert saved.tensors == len(hf_from_nemo(part))
    manifest = read_manifest(tmp_path / "saved")
    assert manifest["options"]["allow_partial"] is True
    assert f"{WHOLE}layers.0.layer_scalar" in manifest["missing"]
    assert any(name.startswith("model.vision_tower.") for name in manifest["missing"])
    assert not verify(tmp_path / "saved").wrong
    unknown = part | {"model.other": torch.ones(1)}
    with pytest.raises(UnknownTensorError, match="does not have"):
        save_hf(unknown, tmp_path / "again", config_from=published / "multimodal", allow_partial=True)


def test_floats_are_cast_as_in_a_conversion(published, tmp_path):
    state = native("multimodal")
    save_hf(state, tmp_path / "saved", config_from=published / "multimodal", dtype="bfloat16")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in hf_from_nemo(state).items()}
    assert_same_tensors(read_directory(tmp_path / "saved"), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "gemma4_unified"}, InputError, "dense model"),
        ({"model_type": "llama"}, ConfigError, "does not name a Gemma 4 model"),
        ({"quantization_config": {"quant_method": "fp8"}}, InputError, "quantised"),
    ],
)
def test_a_config_of_another_model_is_refused(change, error, words, published, tmp_path):
    config = json.loads((published / "text" / "config.json").read_text()) | change
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        save_hf(native("text"), tmp_path / "saved", config_from=tmp_path / "other")
    assert not (tmp_path / "saved").exists()


def test_a_config_that_does_not_say_which_tensors_there_are_is_refused(tmp_path):
    save_model(build_model("text", seed=4), tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"(?s)which tensors.*other/config.json.*head_dim"):
        save_hf(native("text"), tmp_path / "saved", config_from=tmp_path / "other")
