"""`verify` of a merge from its three directories: what `merge` writes is right, and each fault is found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma4_moe import convert, convert_lora, merge, verify
from gemma4_moe.errors import TensorShapeError, UnknownTensorError, UsageError
from gemma4_moe.verifier import pieces
from support.adapters import PREFIX, native_config, random_native, scales_of, write_adapter
from support.checkpoints import write_checkpoint
from support.command import run
from support.models import random_hf_state_dict

PATH = "model.language_model.layers."
SCALED = {"moe_rank_scaling": True}


def base_state(dtype=torch.bfloat16):
    state = random_hf_state_dict(dtype=dtype) | scales_of()
    for layer in (0, 1):
        state[f"{PATH}{layer}.self_attn.q_proj.weight"] = torch.randn(12, 10).to(dtype)
        state[f"{PATH}{layer}.mlp.down_proj.weight"] = torch.randn(10, 9).to(dtype)
    return state


@pytest.fixture
def adapter(tmp_path):
    own = random_native()
    own[f"{PREFIX}{PATH}1.moe.experts.lora_down_B"][2] = 0
    return write_adapter(tmp_path / "native", own, native_config(), SCALED)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize(("source", "form"), [("hf", "nemo"), ("hf", "peft"), ("nemo", "nemo")])
def test_a_merge_is_as_it_should_be(source, form, to, dtype, small, adapter, tmp_path, monkeypatch):
    if small:
        for name, size in (("_PIECE", 13), ("_TILE", 4), ("_BLOCK_BYTES", 64)):
            monkeypatch.setattr(pieces, name, size)
    write_checkpoint(tmp_path / "hf", base_state())
    convert(tmp_path / "hf", tmp_path / "nemo")
    used = adapter
    if form == "peft":
        convert_lora(adapter, tmp_path / "peft", to="peft", base=tmp_path / "hf")
        used = tmp_path / "peft"
    merge(tmp_path / source, used, tmp_path / "merged", to=to, dtype=dtype)
    found = verify(tmp_path / source, tmp_path / "merged", adapter=used)
    assert found.different == ()
    assert found.equal == found.tensors > 10


def merged(tmp_path, adapter, dtype=torch.float32):
    write_checkpoint(tmp_path / "hf", base_state(dtype))
    merge(tmp_path / "hf", adapter, tmp_path / "merged")
    return tmp_path / "hf", tmp_path / "merged"


def changed(directory, name, change):
    for path in directory.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            change(state[name])
            save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "index"),
    [
        (f"{PATH}1.experts.down_proj", (3, 9, 6)),
        (f"{PATH}0.experts.gate_up_proj", (5, 0, 1)),
        (f"{PATH}0.self_attn.q_proj.weight", (11, 4)),
        (f"{PATH}1.experts.down_proj", (2, 0, 0)),
    ],
)
def test_an_element_that_is_off_by_a_thousandth_is_named(name, index, adapter, tmp_path):
    base, target = merged(tmp_path, adapter)

    def shift(tensor):
        tensor[index] *= 1.001

    changed(target, name, shift)
    (found,) = verify(base, target, adapter=adapter).different
    assert (found.name, found.kind, found.count, found.index) == (name, "values", 1, index)


def test_without_the_division_by_the_scale_every_down_projection_differs(adapter, tmp_path):
    base, _ = merged(tmp_path, adapter)
    ones = {name: torch.ones(6) for name in scales_of()}
    convert_lora(adapter, tmp_path / "undivided", to="peft", base=ones)
    merge(base, tmp_path / "undivided", tmp_path / "wrong")
    found = verify(base, tmp_path / "wrong", adapter=adapter)
    assert {each.name for each in found.different} == {f"{PATH}{n}.experts.down_proj" for n in (0, 1)}
    assert all(each.distance.max_absolute > 1e-2 for each in found.different)


def test_an_expert_that_does_not_change_must_keep_its_bits(adapter, tmp_path):
    base, target = merged(tmp_path, adapter)

    def negate_zero(tensor):
        tensor[2, 3, 3] = torch.nextafter(tensor[2, 3, 3], torch.tensor(9.0))

    changed(target, f"{PATH}1.experts.down_proj", negate_zero)
    (found,) = verify(base, target, adapter=adapter).different
    assert (found.count, found.ulps) == (1, 1)


def test_another_alpha_or_the_base_alone_are_found(adapter, tmp_path):
    base, target = merged(tmp_path, adapter)
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "adapter_config.json").write_text(json.dumps(native_config(alpha=11)))
    assert verify(base, target, adapter=other).different_tensors == 8
    assert verify(base, base, adapter=adapter).different_tensors == 8
    assert verify(base, target).different_tensors == 8


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    base, target = merged(tmp_path, adapter)
    more = random_native() | {f"{PREFIX}{PATH}1.mlp.up_proj.lora_{s}.weight": torch.ones(5, 5) for s in "AB"}
    write_adapter(tmp_path / "more", more, native_config(), SCALED)
    with pytest.raises(UnknownTensorError, match="up_proj"):
        verify(base, target, adapter=tmp_path / "more")
    write_adapter(tmp_path / "wide", random_native(H=11, linear=()), native_config(), SCALED)
    with pytest.raises(TensorShapeError, match="does not fit"):
        verify(base, target, adapter=tmp_path / "wide")
    convert_lora(adapter, tmp_path / "peft", to="peft", base=base)
    convert(base, tmp_path / "folded")
    with pytest.raises(UsageError, match="not known"):
        verify(tmp_path / "folded", target, adapter=tmp_path / "peft")


def test_the_command_says_so(adapter, tmp_path):
    base, target = merged(tmp_path, adapter)
    done = run("verify", "--adapter", adapter, base, target)
    assert "0 different" in done.stdout
    run("verify", base, target, status=4)
    assert "--adapter" in run("verify", target, "--adapter", adapter, status=2).stderr
