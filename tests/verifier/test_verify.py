import shutil

import pytest
import torch

from gemma4_moe.converter.convert import convert
from gemma4_moe.errors import (
    CheckpointFormatError,
    ConfigError,
    DuplicateTensorError,
    IncompleteExpertsError,
    UnsupportedCheckpointError,
)
from gemma4_moe.verifier.verify import verify
from support.checkpoints import config_of, write_checkpoint
from support.formulas import hf_from_nemo, legacy_name, nemo_from_hf
from support.models import random_hf_state_dict, read_directory
from support.verification import DOWN, DOWNS, GATE_UP, GATE_UPS, LAYER, SCALE, UNSIGNED, checked, flip, sole

E, H, I = 6, 10, 7  # noqa: E741
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def special(state):
    """Put every kind of value into layer 1: NaNs with a payload, infinities, zeros, subnormals; and unusual scales."""
    info = torch.finfo(state[DOWN].dtype)
    values = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, info.smallest_normal / 2, -info.tiny, info.max, 1.0])
    for name in (DOWN, GATE_UP):
        state[name].view(E, -1)[:, :8] = values.to(state[name].dtype)
    state[SCALE] = torch.tensor([0.0, -0.0, -1.5, torch.inf, 1.0, 0.75]).to(state[SCALE].dtype)
    return state


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_formulas_make_is_right(tmp_path, dtype):
    hf = random_hf_state_dict(dtype=dtype)
    nemo = nemo_from_hf(hf)
    result = checked(tmp_path, hf, nemo)
    assert (result.tensors, result.equal, result.different) == (len(nemo), len(nemo), ())
    assert (result.source, result.target) == (tmp_path / "source", tmp_path / "target")
    shutil.rmtree(tmp_path / "source")
    write_checkpoint(tmp_path / "source", hf_from_nemo(nemo), config_of(hf))
    back = verify(tmp_path / "target", tmp_path / "source")
    assert (back.tensors, back.equal, back.different) == (len(hf), len(hf), ())


@pytest.mark.parametrize("cast", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_in_both_directions(tmp_path, dtype, cast):
    hf = random_hf_state_dict(dtype=dtype)
    nemo = {name: tensor.to(cast) for name, tensor in nemo_from_hf(hf, cast).items()}
    assert checked(tmp_path, hf, nemo).different == ()
    back = {name: tensor.to(dtype) for name, tensor in hf_from_nemo(nemo, dtype).items()}
    write_checkpoint(tmp_path / "back", back, config_of(hf))
    assert verify(tmp_path / "target", tmp_path / "back").different == ()


@pytest.mark.parametrize("cast", ["keep", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_convert_makes_of_unusual_values_is_right(tmp_path, dtype, cast):
    source = write_checkpoint(tmp_path / "hf", special(random_hf_state_dict(dtype=dtype)))
    convert(source, tmp_path / "nemo", dtype=cast)
    assert verify(source, tmp_path / "nemo").different == ()
    convert(tmp_path / "nemo", tmp_path / "again")
    assert verify(tmp_path / "nemo", tmp_path / "again").different == ()


def test_nans_are_expected_with_their_own_bits_or_quiet_with_their_own_sign(tmp_path):
    hf = random_hf_state_dict()
    payload = torch.tensor([0x7F81, 0xFFC3, 0xFF81], dtype=torch.uint16).view(torch.bfloat16)
    hf[DOWN][:2, 0, :3] = payload
    hf[GATE_UP][3, 2, :3] = payload
    hf[SCALE][:2] = torch.tensor([1.0, -0.5])
    nemo = nemo_from_hf(hf)
    nemo[DOWNS][0, :3, 0] = payload
    nemo[DOWNS][1, :3, 0] = torch.tensor([0x7FC0, 0xFFC0, 0xFFC0], dtype=torch.uint16).view(torch.bfloat16)
    nemo[GATE_UPS][3, :3, 2] = payload
    assert checked(tmp_path, hf, nemo).different == ()
    nemo[DOWNS][1, 0, 0] = torch.tensor([0xFFC0], dtype=torch.uint16).view(torch.bfloat16)
    write_checkpoint(tmp_path / "wrong", nemo, config_of(hf))
    found = sole(verify(tmp_path / "source", tmp_path / "wrong"))
    assert (found.index, found.expected, found.found) == ((1, 0, 0), "nan (0x7FC0)", "nan (0xFFC0)")
    assert (found.count, found.ulps, found.max_ulps) == (1, None, None)


def flipped_cases():
    hf = random_hf_state_dict()
    return [("nemo", name) for name in nemo_from_hf(hf)] + [("hf", name) for name in hf]


@pytest.mark.parametrize(("to", "name"), flipped_cases())
@pytest.mark.parametrize(("dtype", "bit"), [(torch.bfloat16, 3), (torch.float32, 0)], ids=str)
def test_one_flipped_bit_is_found_in_any_tensor(tmp_path, to, name, dtype, bit):
    hf = random_hf_state_dict(dtype=dtype)
    nemo = nemo_from_hf(hf)
    source, target = (hf, nemo) if to == "nemo" else (nemo, hf_from_nemo(nemo))
    right = target[name]
    flat = (37 * len(name)) % right.numel()
    target[name] = flip(right, flat, bit)
    found = sole(checked(tmp_path, source, target, hf=hf))
    index = tuple(int(axis) for axis in torch.unravel_index(torch.tensor(flat), right.shape))
    assert (found.name, found.kind, found.count, found.index) == (name, "values", 1, index)
    assert (found.ulps, found.max_ulps) == (2**bit, 2**bit)
    digits = 4 if dtype is torch.bfloat16 else 8
    for said, tensor in ((found.expected, right), (found.found, target[name])):
        value, bits = said.split(" ")
        assert torch.tensor(float(value), dtype=dtype) == tensor[index]
        assert bits == f"(0x{int(tensor.contiguous().view(UNSIGNED[dtype])[index]):0{digits}X})"


def _swapped_halves(hf, nemo):
    gate, up = nemo[GATE_UPS].split(I, dim=2)
    nemo[GATE_UPS] = torch.cat([up, gate], dim=2)
    return GATE_UPS, E * H * 2 * I


def _scale_forgotten(hf, nemo):
    nemo[DOWNS] = hf[DOWN].permute(0, 2, 1).contiguous()
    return DOWNS, None


def _scale_of_the_next_expert(hf, nemo):
    nemo[DOWNS] = nemo_from_hf(hf | {SCALE: hf[SCALE].roll(1)})[DOWNS]
    return DOWNS, None


def _scale_in_the_other_direction(hf, nemo):
    nemo[DOWNS] = (hf[DOWN].float() / hf[SCALE].float()[:, None, None]).to(torch.bfloat16).permute(0, 2, 1).contiguous()
    return DOWNS, None


def _experts_in_another_order(hf, nemo):
    nemo[GATE_UPS] = nemo[GATE_UPS].flip(0).contiguous()
    return GATE_UPS, E * H * 2 * I


def _layers_exchanged(hf, nemo):
    nemo[LAYER + "moe.gate.scale"] = nemo["model.language_model.layers.0.moe.gate.scale"]
    return LAYER + "moe.gate.scale", None


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped_halves, _scale_forgotten, _scale_of_the_next_expert, _scale_in_the_other_direction,
        _experts_in_another_order, _layers_exchanged,
    ],
)  # fmt: skip
def test_mistakes_of_a_converter_are_found(tmp_path, mistake):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    name, most = mistake(hf, nemo)
    found = sole(checked(tmp_path, hf, nemo))
    assert (found.name, found.kind) == (name, "values")
    if most is not None:
        assert 0.9 * most < found.count <= most


@pytest.mark.parametrize(("sizes", "hf_name", "nemo_name"), [
    ({"H": 14, "I": 7}, GATE_UP, GATE_UPS),  # H = 2I
    ({"H": 8, "I": 8}, DOWN, DOWNS),
])  # fmt: skip
def test_a_forgotten_transpose_is_found_where_shapes_do_not_tell(tmp_path, sizes, hf_name, nemo_name):
    hf = random_hf_state_dict(**sizes)
    nemo = nemo_from_hf(hf)
    nemo[nemo_name] = nemo[nemo_name].permute(0, 2, 1).contiguous()
    assert nemo[nemo_name].shape == hf[hf_name].shape
    assert sole(checked(tmp_path, hf, nemo)).name == nemo_name


@pytest.mark.parametrize(("source_dtype", "target_dtype"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
])  # fmt: skip
def test_a_fold_that_rounds_twice_is_found(tmp_path, source_dtype, target_dtype):
    hf = random_hf_state_dict(dtype=source_dtype)
    nemo = {name: tensor.to(target_dtype) for name, tensor in nemo_from_hf(hf, target_dtype).items()}
    product = hf[DOWN].to(torch.bfloat16).float() * hf[SCALE].float()[:, None, None]
    nemo[DOWNS] = product.to(torch.bfloat16).to(target_dtype).permute(0, 2, 1).contiguous()
    assert sole(checked(tmp_path, hf, nemo)).name == DOWNS


def test_side_files(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    assert checked(tmp_path, hf, nemo).different == ()
    target = tmp_path / "target"
    (target / "tokenizer.json").write_bytes(b'{"version": "1.1"} \n')
    (target / "config.json").unlink()
    (tmp_path / "source/README.md").write_bytes(b"long" * 2**19)
    (target / "README.md").write_bytes(b"long" * 2**19 + b"er")
    (target / "NOTICE").write_text("extra ones don't count")
    (tmp_path / "source/LICENSE").write_text("Apache-2.0")
    (target / "LICENSE").write_text("Apache")
    result = verify(tmp_path / "source", target)
    assert (result.tensors, result.equal) == (len(nemo), len(nemo))
    size = (tmp_path / "source/config.json").stat().st_size
    assert [(d.name, d.kind, d.expected, d.found) for d in result.different] == [
        ("LICENSE", "file", "10 bytes, as in the source", "6 bytes, the first that differs at 6"),
        ("README.md", "file", "2097152 bytes, as in the source", "2097154 bytes, the first that differs at 2097152"),
        ("config.json", "file", f"{size} bytes, as in the source", None),
        ("tokenizer.json", "file", "20 bytes, as in the source", "20 bytes, the first that differs at 15"),
    ]


def test_what_is_no_checkpoint_is_an_error_and_not_a_difference(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    checked(tmp_path, hf, nemo)
    source, target = tmp_path / "source", tmp_path / "target"
    with pytest.raises(CheckpointFormatError, match="no such directory"):
        verify(source, tmp_path / "absent")
    dense = {name: tensor for name, tensor in hf.items() if "experts" not in name and "router" not in name}
    write_checkpoint(tmp_path / "dense", dense, config_of(hf))
    with pytest.raises(UnsupportedCheckpointError, match="no mixture-of-experts layer"):
        verify(source, tmp_path / "dense")
    with pytest.raises(UnsupportedCheckpointError, match="no mixture-of-experts layer"):
        verify(tmp_path / "dense", target)
    write_checkpoint(tmp_path / "both", hf | nemo, config_of(hf))
    with pytest.raises(UnsupportedCheckpointError, match="names of both layouts"):
        verify(source, tmp_path / "both")
    write_checkpoint(tmp_path / "twice", hf | {legacy_name(DOWN): hf[DOWN]}, config_of(hf))
    with pytest.raises(DuplicateTensorError, match="two spellings"):
        verify(source, tmp_path / "twice")
    del hf[SCALE]
    write_checkpoint(tmp_path / "half", hf)
    with pytest.raises(IncompleteExpertsError):
        verify(tmp_path / "half", target)
    (source / "config.json").unlink()
    with pytest.raises(ConfigError):
        verify(source, target)


def test_sources_and_targets_are_only_read(tmp_path):
    hf = random_hf_state_dict()
    checked(tmp_path, hf, nemo_from_hf(hf))
    assert read_directory(tmp_path / "source").keys() == hf.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
