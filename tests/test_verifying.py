import json
import shutil
import tracemalloc

import pytest
import torch

from gemma4_moe import verifying
from gemma4_moe.comparison import run_jobs
from gemma4_moe.converting import convert
from gemma4_moe.errors import (
    CheckpointFormatError,
    ConfigError,
    DuplicateTensorError,
    IncompleteExpertsError,
    UnsupportedCheckpointError,
    UsageError,
)
from gemma4_moe.verifying import verify
from support.checkpoints import config_of, write_checkpoint
from support.formulas import hf_from_nemo, legacy_name, nemo_from_hf
from support.models import random_hf_state_dict, read_directory

LAYER = "model.language_model.layers.1."
DOWN, GATE_UP, SCALE = (
    LAYER + rest for rest in ("experts.down_proj", "experts.gate_up_proj", "router.per_expert_scale")
)
DOWNS, GATE_UPS = LAYER + "moe.experts.down_projs", LAYER + "moe.experts.gate_and_up_projs"
E, H, I = 6, 10, 7  # noqa: E741
UNSIGNED = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def checked(tmp_path, source, target, *, hf=None, **options):
    """Write both state dicts, the target in another number of files, and verify the one against the other."""
    config = config_of(hf if hf is not None else source)
    write_checkpoint(tmp_path / "source", source, config, files=2)
    write_checkpoint(tmp_path / "target", target, config, files=3)
    return verify(tmp_path / "source", tmp_path / "target", **options)


def sole(result):
    """The only difference of a verification."""
    assert len(result.different) == 1, [str(difference) for difference in result.different]
    assert result.equal == result.tensors - 1
    return result.different[0]


def flip(tensor, flat, bit):
    """A copy of `tensor` in which one bit of one element is the other one."""
    bits = tensor.contiguous().view(UNSIGNED[tensor.dtype]).clone()
    value = int(bits.view(-1)[flat]) ^ (1 << bit)
    bits.view(-1)[flat] = value
    return bits.view(tensor.dtype)


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


def test_the_first_of_several_is_the_first_in_the_targets_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(verifying, "_TILE", 4)
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    right = nemo[DOWNS]
    # In tiles of four, [4, 1, 9] is looked at after [4, 2, 0], and the other expert last.
    for index, bit in (((4, 2, 0), 2), ((4, 1, 9), 0), ((5, 0, 0), 6)):
        flat = (index[0] * I + index[1]) * H + index[2]
        nemo[DOWNS] = flip(nemo[DOWNS], flat, bit)
    found = sole(checked(tmp_path, hf, nemo))
    assert (found.count, found.index, found.ulps, found.max_ulps) == (3, (4, 1, 9), 1, 64)
    assert float(found.expected.split(" ")[0]) == pytest.approx(right[4, 1, 9].item(), rel=1e-8)


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


def test_missing_extra_shape_and_dtype(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    total = len(nemo)
    del nemo[GATE_UPS]
    nemo[LAYER + "moe.experts.down_bias"] = torch.zeros(E, H)
    nemo[LAYER + "moe.gate.proj.weight"] = nemo[LAYER + "moe.gate.proj.weight"].T
    nemo[DOWNS] = nemo[DOWNS].float()
    result = checked(tmp_path, hf, nemo)
    assert (result.tensors, result.equal) == (total + 1, total - 3)
    assert {(d.name, d.kind, d.expected, d.found) for d in result.different} == {
        (GATE_UPS, "missing", f"BF16 [{E}, {H}, {2 * I}]", None),
        (LAYER + "moe.experts.down_bias", "extra", None, f"F32 [{E}, {H}]"),
        (LAYER + "moe.gate.proj.weight", "shape", f"[{E}, {H}]", f"[{H}, {E}]"),
        (DOWNS, "dtype", "BF16", "F32"),
    }
    assert json.loads(json.dumps([d.as_dict() for d in result.different]))[0]["count"] is None
    assert f"{DOWNS}: dtype: expected BF16, found F32" in map(str, result.different)


def test_one_tensor_that_was_not_cast_is_found_and_integers_are_never_cast(tmp_path):
    hf = random_hf_state_dict() | {"steps": torch.tensor([3, 4, 5])}
    nemo = {n: t.float() if t.is_floating_point() else t for n, t in nemo_from_hf(hf, torch.float32).items()}
    assert checked(tmp_path, hf, nemo).different == ()
    nemo[GATE_UPS] = nemo[GATE_UPS].to(torch.bfloat16)
    nemo["steps"] = torch.tensor([3, 4, 6])
    write_checkpoint(tmp_path / "wrong", nemo, config_of(hf))
    found = verify(tmp_path / "source", tmp_path / "wrong").different
    assert [(d.name, d.kind, d.expected, d.found, d.ulps) for d in found] == [
        (GATE_UPS, "dtype", "F32", "BF16", None),
        ("steps", "values", "5 (0x0000000000000005)", "6 (0x0000000000000006)", None),
    ]
    assert found[1].index == (2,)


def paired(hf, nemo, layer=LAYER):
    """What `hf` itself is to `nemo`: not native bits with ones, but pairs that fold to them."""
    back = hf_from_nemo(nemo)
    return back | {layer + rest: hf[layer + rest] for rest in ("experts.down_proj", "router.per_expert_scale")}


def test_pairs_that_fold_to_the_sources_bits_are_right_expert_by_expert(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    mixed = paired(hf, nemo)
    native = nemo[DOWNS].permute(0, 2, 1)
    mixed[DOWN] = torch.stack([native[e] if e % 2 else hf[DOWN][e] for e in range(E)])
    mixed[SCALE] = torch.tensor([1.0 if e % 2 else float(hf[SCALE][e]) for e in range(E)], dtype=torch.bfloat16)
    assert checked(tmp_path, nemo, mixed, hf=hf).different == ()

    flat = (2 * H + 3) * I + 4
    nemo_from_pairs = nemo_from_hf(hf | {DOWN: flip(mixed[DOWN], flat, 6)})
    mixed[DOWN] = flip(mixed[DOWN], flat, 6)
    write_checkpoint(tmp_path / "wrong", mixed, config_of(hf))
    found = sole(verify(tmp_path / "source", tmp_path / "wrong"))
    assert (found.name, found.kind, found.count, found.index) == (DOWN, "fold", 1, (2, 3, 4))
    for said, state in ((found.expected, nemo), (found.found, nemo_from_pairs)):
        assert float(said.split(" ")[0]) == pytest.approx(state[DOWNS][2, 4, 3].item(), rel=1e-8)


def test_a_scale_that_is_not_one_beside_native_bits_is_what_is_wrong(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    back = hf_from_nemo(nemo)
    back[SCALE] = torch.tensor([1.0, 1.0, 1.5, 1.0, -1.0, torch.nan], dtype=torch.float32)
    found = sole(checked(tmp_path, nemo, back, hf=hf))
    assert (found.name, found.kind, found.count, found.index) == (SCALE, "values", 3, (2,))
    assert (found.expected, found.found) == ("1 (0x3F800000)", "1.5 (0x3FC00000)")
    assert (found.ulps, found.max_ulps) == (2**22, 2 * 0x3F800000)


def test_a_scale_may_have_any_float_dtype_and_no_other(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    back = hf_from_nemo(nemo)
    back[SCALE] = torch.full((E,), 1.0, dtype=torch.float16)
    assert checked(tmp_path, nemo, back, hf=hf).different == ()
    back[SCALE] = torch.full((E,), 1, dtype=torch.int32)
    write_checkpoint(tmp_path / "wrong", back, config_of(hf))
    found = sole(verify(tmp_path / "source", tmp_path / "wrong"))
    assert (found.name, found.kind, found.expected, found.found) == (SCALE, "dtype", "BF16, F16, F32", "I32")


def test_ones_without_their_experts_are_still_looked_at(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    back = hf_from_nemo(nemo)
    del back[DOWN]
    back[SCALE][3] = 2.0
    result = checked(tmp_path, nemo, back, hf=hf)
    assert [(d.name, d.kind, d.index) for d in result.different] == [(DOWN, "missing", None), (SCALE, "values", (3,))]
    assert result.equal == len(hf) - 2


def test_experts_without_their_scale_are_still_looked_at(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    back = hf_from_nemo(nemo)
    del back[SCALE]
    back[DOWN] = flip(back[DOWN], 5, 0)
    result = checked(tmp_path, nemo, back, hf=hf)
    assert [(d.name, d.kind) for d in result.different] == [(SCALE, "missing"), (DOWN, "values")]


def test_the_same_layout_in_another_spelling_keeps_every_bit(tmp_path):
    hf = random_hf_state_dict()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert checked(tmp_path, hf, legacy).different == ()
    name = legacy_name(SCALE)
    wrong = legacy | {name: flip(legacy[name], 1, 15)}
    write_checkpoint(tmp_path / "wrong", wrong, config_of(hf))
    found = sole(verify(tmp_path / "source", tmp_path / "wrong"))
    assert (found.name, found.index, found.ulps) == (name, (1,), 2 * int(hf[SCALE].view(torch.int16)[1]))
    cast = {name: tensor.float() for name, tensor in hf.items()}
    write_checkpoint(tmp_path / "cast", cast, config_of(hf))
    assert {d.kind for d in verify(tmp_path / "source", tmp_path / "cast").different} == {"dtype"}


def test_a_legacy_source(tmp_path):
    hf = random_hf_state_dict()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert checked(tmp_path, legacy, nemo_from_hf(hf), hf=hf).different == ()


def test_side_files(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    assert checked(tmp_path, hf, nemo).different == ()
    target = tmp_path / "target"
    (target / "tokenizer.json").write_bytes(b'{"version": "1.1"} \n')
    (target / "config.json").unlink()
    (tmp_path / "source/README.md").write_bytes(b"long" * 2**19)
    (target / "README.md").write_bytes(b"long" * 2**19 + b"er")
    (target / "LICENSE").write_text("extra ones don't count")
    result = verify(tmp_path / "source", target)
    assert (result.tensors, result.equal) == (len(nemo), len(nemo))
    size = (tmp_path / "source/config.json").stat().st_size
    assert [(d.name, d.kind, d.expected, d.found) for d in result.different] == [
        ("README.md", "file", "2097152 bytes, as in the source", "2097154 bytes, the first other one at 2097152"),
        ("config.json", "file", f"{size} bytes, as in the source", None),
        ("tokenizer.json", "file", "20 bytes, as in the source", "20 bytes, the first other one at 15"),
    ]


def test_what_a_difference_says(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    nemo[GATE_UPS][0, 1, 2] = 1.0
    hf[GATE_UP][0, 2, 1] = 1.5
    assert str(sole(checked(tmp_path, hf, nemo))).splitlines() == [
        f"{GATE_UPS}: values differ in 1 elements",
        "  first at [0, 1, 2]: expected 1.5 (0x3FC0), found 1 (0x3F80), 64 ulps apart",
        "  largest distance: 64 ulps",
    ]


def test_progress_counts_the_targets_bytes(tmp_path):
    hf = random_hf_state_dict()
    nemo = nemo_from_hf(hf)
    calls = []
    checked(tmp_path, nemo, hf_from_nemo(nemo), hf=hf, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in hf.values())
    assert calls[-1] == (total, total)
    assert {whole for _, whole in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("all_differ", [False, True])
def test_memory_stays_within_the_budget_whatever_differs(tmp_path, monkeypatch, all_differ):
    hf = random_hf_state_dict(layers=1, E=30, H=500, I=330, dtype=torch.float32)
    hf["model.language_model.embed_tokens.weight"] = torch.rand(12_000, 500)
    nemo = nemo_from_hf(hf, torch.float32)
    if all_differ:
        nemo = {name: tensor + 1 for name, tensor in nemo.items()}
    write_checkpoint(tmp_path / "hf", hf)
    write_checkpoint(tmp_path / "nemo", nemo, config_of(hf))
    largest = max(tensor.nbytes for tensor in nemo.values())
    budget = 12 * 2**20
    assert largest > 3 * budget
    del hf, nemo
    peaks = []

    def measured(*args):
        tracemalloc.start()
        try:
            return run_jobs(*args)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(verifying, "run_jobs", measured)
    result = verify(tmp_path / "hf", tmp_path / "nemo", max_memory=budget)
    assert (result.equal == 0) is all_differ
    assert 2**20 < peaks[0] < budget


def test_a_budget_below_one_expert_is_refused(tmp_path):
    hf = random_hf_state_dict()
    with pytest.raises(UsageError, match="smaller than one expert") as caught:
        checked(tmp_path, hf, nemo_from_hf(hf), max_memory=1000)
    least = int(caught.value.facts["expected"].split()[2])
    assert verify(tmp_path / "source", tmp_path / "target", max_memory=least).different == ()


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
