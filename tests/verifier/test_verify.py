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
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import hf_from_nemo, legacy_name, nemo_from_hf
from support.models import random_hf_state_dict
from support.verification import (
    DOWN,
    DOWNS,
    GATE_UP,
    GATE_UPS,
    LAYER,
    SCALE,
    UNSIGNED,
    both_layouts,
    checked,
    flip,
    judged,
    place,
    sole,
)

E, H, I = 6, 10, 7  # noqa: E741
GATE_SCALE = LAYER + "moe.gate.scale"
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def special(state):
    """Put every kind of value into layer 1: NaNs with a payload, infinities, zeros, subnormals; and unusual scales."""
    info = torch.finfo(state[DOWN].dtype)
    values = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, info.smallest_normal / 2, -info.tiny, info.max, 1.0])
    for name in (DOWN, GATE_UP):
        state[name].view(E, -1)[:, :8] = values.to(state[name].dtype)
    state[SCALE] = torch.tensor([0.0, -0.0, -1.5, torch.inf, 1.0, 0.75]).to(state[SCALE].dtype)
    return state


@pytest.mark.parametrize("cast", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_formulas_make_is_right_in_both_directions_and_any_cast(tmp_path, dtype, cast):
    hf = random_hf_state_dict(dtype=dtype)
    nemo = {name: tensor.to(cast) for name, tensor in nemo_from_hf(hf, cast).items()}
    result = checked(tmp_path, hf, nemo)
    assert (result.tensors, result.equal, result.different) == (len(nemo), len(nemo), ())
    assert (result.source, result.target) == (tmp_path / "source", tmp_path / "target")
    back = {name: tensor.to(dtype) for name, tensor in hf_from_nemo(nemo, dtype).items()}
    write_checkpoint(tmp_path / "back", back, config_of(hf))
    result = verify(tmp_path / "target", tmp_path / "back")
    assert (result.tensors, result.equal, result.different) == (len(hf), len(hf), ())


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
    found = sole(judged(tmp_path, nemo, hf))
    assert (found.index, found.expected, found.found) == ((1, 0, 0), "nan (0x7FC0)", "nan (0xFFC0)")
    assert (found.count, found.ulps, found.max_ulps) == (1, None, None)


HF, NEMO, _ = both_layouts()


@pytest.mark.parametrize(("to", "name"), [*(("nemo", name) for name in NEMO), *(("hf", name) for name in HF)])
@pytest.mark.parametrize(("dtype", "bit"), [(torch.bfloat16, 3), (torch.float32, 0)], ids=str)
def test_one_flipped_bit_is_found_in_any_tensor(tmp_path, to, name, dtype, bit):
    hf, nemo, back = both_layouts(dtype=dtype)
    source, target = (hf, nemo) if to == "nemo" else (nemo, back)
    right = target[name]
    flat = (37 * len(name)) % right.numel()
    target[name] = flip(right, flat, bit)
    found = sole(checked(tmp_path, source, target, hf=hf))
    index = place(flat, right)
    assert (found.name, found.kind, found.count, found.index) == (name, "values", 1, index)
    assert (found.ulps, found.max_ulps) == (2**bit, 2**bit)
    digits = 4 if dtype is torch.bfloat16 else 8
    for said, tensor in ((found.expected, right), (found.found, target[name])):
        value, bits = said.split(" ")
        assert torch.tensor(float(value), dtype=dtype) == tensor[index]
        assert bits == f"(0x{int(tensor.contiguous().view(UNSIGNED[dtype])[index]):0{digits}X})"


def per_expert(scale):
    return scale.float()[:, None, None]


#: The tensor that a converter gets wrong, and its mistake as a function of the tensors of both layouts.
MISTAKES = {
    "swapped halves": (GATE_UPS, lambda of: torch.cat(of[GATE_UPS].split(I, dim=2)[::-1], dim=2)),
    "experts in another order": (GATE_UPS, lambda of: of[GATE_UPS].flip(0)),
    "scale forgotten": (DOWNS, lambda of: of[DOWN].permute(0, 2, 1)),
    "scale of the next expert": (DOWNS, lambda of: (of[DOWN] * per_expert(of[SCALE].roll(1))).permute(0, 2, 1)),
    "scale in the other direction": (DOWNS, lambda of: (of[DOWN] / per_expert(of[SCALE])).permute(0, 2, 1)),
    "layers exchanged": (GATE_SCALE, lambda of: of[GATE_SCALE.replace(".1.", ".0.")]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_converter_are_found(tmp_path, mistake):
    hf, nemo, _ = both_layouts()
    name, wrong = MISTAKES[mistake]
    nemo[name] = wrong(hf | nemo).to(torch.bfloat16)
    found = sole(checked(tmp_path, hf, nemo))
    assert (found.name, found.kind) == (name, "values")
    if name == GATE_UPS:
        assert 0.9 < found.count / (E * H * 2 * I) <= 1


@pytest.mark.parametrize(("sizes", "hf_name", "nemo_name"), [
    ({"H": 14, "I": 7}, GATE_UP, GATE_UPS),  # H = 2I
    ({"H": 8, "I": 8}, DOWN, DOWNS),
])  # fmt: skip
def test_a_forgotten_transpose_is_found_where_shapes_do_not_tell(tmp_path, sizes, hf_name, nemo_name):
    hf, nemo, _ = both_layouts(**sizes)
    nemo[nemo_name] = nemo[nemo_name].permute(0, 2, 1).contiguous()
    assert nemo[nemo_name].shape == hf[hf_name].shape
    assert sole(checked(tmp_path, hf, nemo)).name == nemo_name


@pytest.mark.parametrize(("source_dtype", "target_dtype"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
])  # fmt: skip
def test_a_fold_that_rounds_twice_is_found(tmp_path, source_dtype, target_dtype):
    hf = random_hf_state_dict(dtype=source_dtype)
    nemo = {name: tensor.to(target_dtype) for name, tensor in nemo_from_hf(hf, target_dtype).items()}
    product = hf[DOWN].to(torch.bfloat16).float() * per_expert(hf[SCALE])
    nemo[DOWNS] = product.to(torch.bfloat16).to(target_dtype).permute(0, 2, 1).contiguous()
    assert sole(checked(tmp_path, hf, nemo)).name == DOWNS


def test_side_files(tmp_path):
    hf, nemo, _ = both_layouts()
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
    hf, nemo, _ = both_layouts()
    checked(tmp_path, hf, nemo)
    states = {
        "dense": {name: tensor for name, tensor in hf.items() if "experts" not in name and "router" not in name},
        "both": hf | nemo,
        "twice": hf | {legacy_name(DOWN): hf[DOWN]},
        "half": {name: tensor for name, tensor in hf.items() if name != SCALE},
        "without config": hf,
    }
    for name, state in states.items():
        write_checkpoint(tmp_path / name, state, config_of(hf))
    (tmp_path / "without config/config.json").unlink()
    for source, target, error, words in (
        ("source", "absent", CheckpointFormatError, "no such directory"),
        ("source", "dense", UnsupportedCheckpointError, "no mixture-of-experts layer"),
        ("dense", "target", UnsupportedCheckpointError, "no mixture-of-experts layer"),
        ("source", "both", UnsupportedCheckpointError, "names of both layouts"),
        ("source", "twice", DuplicateTensorError, "two spellings"),
        ("half", "target", IncompleteExpertsError, "scale missing"),
        ("without config", "target", ConfigError, "missing"),
    ):
        with pytest.raises(error, match=words):
            verify(tmp_path / source, tmp_path / target)


def test_sources_and_targets_are_only_read(tmp_path):
    hf, nemo, _ = both_layouts()
    checked(tmp_path, hf, nemo)
    before = contents(tmp_path)
    verify(tmp_path / "source", tmp_path / "target")
    assert contents(tmp_path) == before
