import numpy as np
import pytest
import torch

from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, UnsupportedCheckpointError, UsageError
from gemma4_moe.verifier.diff import diff
from support.checkpoints import write_checkpoint
from support.formulas import legacy_name, nemo_from_hf
from support.headers import entry, raw_file
from support.models import random_hf_state_dict
from support.verification import flip, place

LAYER = "model.language_model.layers.0."


def written(tmp_path, *states):
    """The directories of state dicts, in one file, in two, and so on."""
    config = {"model_type": "not looked at"}
    return [write_checkpoint(tmp_path / "abc"[n], state, config, files=n + 1) for n, state in enumerate(states)]


@pytest.mark.parametrize("form", [dict, nemo_from_hf], ids=["hf", "nemo"])
def test_equal_checkpoints_cut_differently_into_files(tmp_path, form):
    state = form(random_hf_state_dict())
    a, b = written(tmp_path, state, dict(reversed(state.items())))
    result = diff(a, b)
    assert (result.tensors, result.equal, result.different) == (len(state), len(state), ())
    assert (result.source, result.target) == (a, b)


@pytest.mark.parametrize("form", [dict, nemo_from_hf], ids=["hf", "nemo"])
def test_one_flipped_bit_in_any_tensor(tmp_path, form):
    state = form(random_hf_state_dict(layers=1))
    for number, (name, tensor) in enumerate(state.items()):
        flat = 11 * number % tensor.numel()
        (tmp_path / name).mkdir()
        result = diff(*written(tmp_path / name, state, state | {name: flip(tensor, flat, 2)}))
        assert (result.tensors, result.equal) == (len(state), len(state) - 1)
        (found,) = result.different
        index = place(flat, tensor)
        assert (found.name, found.kind, found.count, found.index) == (name, "values", 1, index)
        assert (found.ulps, found.max_ulps) == (4, 4)
        assert float(found.expected.split(" ")[0]) == pytest.approx(tensor[index].item(), rel=1e-8)


def test_another_spelling_is_no_difference_and_keeps_its_own_name(tmp_path):
    hf = random_hf_state_dict()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    name = legacy_name(LAYER + "experts.down_proj")
    a, b, c = written(tmp_path, hf, legacy, legacy | {name: -legacy[name]})
    assert diff(a, b).different == ()
    (found,) = diff(a, c).different
    assert (found.name, found.count) == (name, hf[LAYER + "experts.down_proj"].numel())


def test_missing_extra_shape_and_dtype(tmp_path):
    hf = random_hf_state_dict()
    other = dict(hf)
    del other[LAYER + "layer_scalar"]
    other[LAYER + "layer_bias"] = torch.ones(2)
    other[LAYER + "router.scale"] = hf[LAYER + "router.scale"].float()
    other[LAYER + "router.proj.weight"] = hf[LAYER + "router.proj.weight"].T
    result = diff(*written(tmp_path, hf, other))
    assert (result.tensors, result.equal) == (len(hf) + 1, len(hf) - 3)
    assert {(d.name.removeprefix(LAYER), d.kind, d.expected, d.found) for d in result.different} == {
        ("layer_scalar", "missing", "BF16 [1]", None),
        ("layer_bias", "extra", None, "F32 [2]"),
        ("router.scale", "dtype", "BF16", "F32"),
        ("router.proj.weight", "shape", "[6, 10]", "[10, 6]"),
    }


def test_nans_and_zeros_are_compared_as_bits(tmp_path):
    hf = random_hf_state_dict(dtype=torch.float32)
    name = LAYER + "router.scale"
    hf[name][:4] = torch.tensor([0x7FC00001, 0x7FC00002, 0, 0x7F800000], dtype=torch.int32).view(torch.float32)
    bits = hf[name].clone().view(torch.int32)
    bits[:4] = torch.tensor([0x7FC00001, 0x7FC00003, -(2**31), 0x7F7FFFFF], dtype=torch.int32)
    a, b, c = written(tmp_path, hf, hf, hf | {name: bits.view(torch.float32)})
    assert diff(a, b).different == ()
    (found,) = diff(a, c).different
    assert (found.count, found.index, found.expected, found.found) == (3, (1,), "nan (0x7FC00002)", "nan (0x7FC00003)")
    assert (found.ulps, found.max_ulps) == (None, 1)  # from infinity to the largest number; the zeros are 0 apart


@pytest.mark.parametrize(
    ("tag", "shape", "data", "changed", "index", "expected", "found"),
    [
        ("I64", [3], b"\1" + b"\0" * 23, 8, (1,), "0 (0x0000000000000000)", "1 (0x0000000000000001)"),
        ("I8", [2, 2], b"\0\1\2\3", 3, (1, 1), "3 (0x03)", "2 (0x02)"),
        ("BOOL", [4], b"\0\0\0\0", 2, (2,), "False (0x00)", "True (0x01)"),
        ("F64", [2], np.array([0.0, 1.0]).tobytes(), 8, (1,),
         "1.0 (0x3FF0000000000000)", "1.0000000000000002 (0x3FF0000000000001)"),
        ("C64", [2], b"\0" * 16, 8, (1,), "0x0000000000000000", "0x0000000000000001"),
        ("F8_E4M3", [2, 3], b"\x38" * 6, 4, (1, 1), "1 (0x38)", "1.125 (0x39)"),
        ("F8_E8M0", [3], b"\x7f" * 3, 1, (1,), "0x7F", "0x7E"),
        ("F4", [2, 4], b"\0\0\0\x50", 3, (1, 2), "0x50", "0x51"),
        ("F6_E2M3", [2, 4], b"\0" * 6, 4, (1, 1), "0x00", "0x01"),
    ],
)  # fmt: skip
def test_every_dtype_is_compared(tmp_path, tag, shape, data, changed, index, expected, found):
    other = bytearray(data)
    other[changed] ^= 1
    for name, content in (("a", data), ("b", bytes(other))):
        path = tmp_path / name
        path.mkdir()
        scale = f"{LAYER}router.scale"
        header = {"x": entry(tag, shape, 0, len(data)), scale: entry("U8", [1], len(data), len(data) + 1)}
        (path / "model.safetensors").write_bytes(raw_file(header, content + b"\0"))
    (difference,) = diff(tmp_path / "a", tmp_path / "b").different
    assert (difference.name, difference.count, difference.index) == ("x", 1, index)
    assert (difference.expected, difference.found) == (expected, found)
    assert difference.ulps == (1 if tag == "F8_E4M3" else None)


def test_a_long_tensor_is_compared_to_its_end_and_an_empty_one_is_equal(tmp_path):
    state = {LAYER + "router.scale": torch.zeros(3, 70_001, dtype=torch.float16), "none": torch.zeros(0, 4)}
    other = {name: tensor.clone() for name, tensor in state.items()}
    other[LAYER + "router.scale"][2, 70_000] = 2.0**-24
    other[LAYER + "router.scale"][1, 3] = -(2.0**-24)
    a, b = written(tmp_path, state, other)
    (found,) = diff(a, b).different
    assert (found.count, found.index, found.ulps, found.max_ulps) == (2, (1, 3), 1, 1)


def test_different_layouts_are_refused(tmp_path):
    hf = random_hf_state_dict()
    a, b = written(tmp_path, hf, nemo_from_hf(hf))
    with pytest.raises(UnsupportedCheckpointError, match="different layouts") as caught:
        diff(a, b)
    assert caught.value.exit_status == 3
    assert "verify" in caught.value.hint
    assert str(b) in caught.value.facts["file"]


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    hf = random_hf_state_dict()
    down = LAYER + "experts.down_proj"
    a, b, c = written(tmp_path, hf, hf | nemo_from_hf(hf), hf | {legacy_name(down): hf[down]})
    with pytest.raises(UnsupportedCheckpointError, match="both layouts"):
        diff(a, b)
    with pytest.raises(CheckpointFormatError):
        diff(a, tmp_path / "absent")
    with pytest.raises(DuplicateTensorError, match="two spellings"):
        diff(a, c)
    with pytest.raises(UsageError, match="memory budget"):
        diff(a, a, max_memory=1)


def test_progress_and_files_without_config(tmp_path):
    hf = random_hf_state_dict()
    a, b = written(tmp_path, hf, hf)
    for path in (a, b):
        (path / "config.json").unlink()
    (a / "README.md").write_text("side files are not looked at")
    calls = []
    assert diff(a, b, progress=lambda *call: calls.append(call)).different == ()
    total = sum(tensor.nbytes for tensor in hf.values())
    assert calls[-1] == (total, total)
