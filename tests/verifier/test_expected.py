import json
from dataclasses import asdict

import pytest
import torch

from support.formulas import legacy_name, nemo_from_hf
from support.models import random_hf_state_dict
from support.verification import DOWN, DOWNS, GATE_UPS, LAYER, SCALE, both_layouts, checked, flip, judged, place, sole

E, H, I = 6, 10, 7  # noqa: E741


def test_missing_extra_shape_and_dtype(tmp_path):
    hf, nemo, _ = both_layouts()
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
    assert json.loads(json.dumps([asdict(d) for d in result.different]))[0]["count"] is None
    assert f"{DOWNS}: dtype: expected BF16, found F32" in map(str, result.different)


def test_one_tensor_that_was_not_cast_is_found_and_integers_are_never_cast(tmp_path):
    hf = random_hf_state_dict() | {"steps": torch.tensor([3, 4, 5])}
    nemo = {n: t.float() if t.is_floating_point() else t for n, t in nemo_from_hf(hf, torch.float32).items()}
    assert checked(tmp_path, hf, nemo).different == ()
    nemo[GATE_UPS] = nemo[GATE_UPS].to(torch.bfloat16)
    nemo["steps"] = torch.tensor([3, 4, 6])
    found = judged(tmp_path, nemo, hf).different
    assert [(d.name, d.kind, d.expected, d.found, d.ulps) for d in found] == [
        (GATE_UPS, "dtype", "F32", "BF16", None),
        ("steps", "values", "5 (0x0000000000000005)", "6 (0x0000000000000006)", None),
    ]
    assert found[1].index == (2,)


def test_pairs_that_fold_to_the_sources_bits_are_right_expert_by_expert(tmp_path):
    hf, nemo, mixed = both_layouts()
    for tensor in (DOWN, SCALE):
        mixed[tensor][::2] = hf[tensor][::2]
    assert checked(tmp_path, nemo, mixed, hf=hf).different == ()

    flat = (2 * H + 3) * I + 4
    nemo_from_pairs = nemo_from_hf(hf | {DOWN: flip(mixed[DOWN], flat, 6)})
    mixed[DOWN] = flip(mixed[DOWN], flat, 6)
    found = sole(judged(tmp_path, mixed, hf))
    assert (found.name, found.kind, found.count, found.index) == (DOWN, "fold", 1, (2, 3, 4))
    for said, state in ((found.expected, nemo), (found.found, nemo_from_pairs)):
        assert float(said.split(" ")[0]) == pytest.approx(state[DOWNS][2, 4, 3].item(), rel=1e-8)


def test_any_scale_is_right_where_an_expert_is_all_zeros(tmp_path):
    hf, nemo, back = both_layouts()
    nemo[DOWNS][4] = 0
    back[DOWN][4] = 0
    back[SCALE][4] = 0.5
    assert checked(tmp_path, nemo, back, hf=hf).different == ()
    back[SCALE][4] = -0.5
    found = sole(judged(tmp_path, back, hf))
    assert (found.name, found.index) == (SCALE, (4,))  # zeros of the other sign


def test_a_scale_that_is_not_one_beside_native_bits_is_what_is_wrong(tmp_path):
    hf, nemo, back = both_layouts()
    back[SCALE] = torch.tensor([1.0, 1.0, 1.5, 1.0, -1.0, torch.nan], dtype=torch.float32)
    found = sole(checked(tmp_path, nemo, back, hf=hf))
    assert (found.name, found.kind, found.count, found.index) == (SCALE, "values", 3, (2,))
    assert (found.expected, found.found) == ("1 (0x3F800000)", "1.5 (0x3FC00000)")
    assert (found.ulps, found.max_ulps) == (2**22, 2 * 0x3F800000)


def test_a_scale_may_have_any_float_dtype_and_no_other(tmp_path):
    hf, nemo, back = both_layouts()
    back[SCALE] = torch.full((E,), 1.0, dtype=torch.float16)
    assert checked(tmp_path, nemo, back, hf=hf).different == ()
    back[SCALE] = torch.full((E,), 1, dtype=torch.int32)
    found = sole(judged(tmp_path, back, hf))
    assert (found.name, found.kind, found.expected, found.found) == (SCALE, "dtype", "BF16, F16, F32", "I32")


@pytest.mark.parametrize(("missing", "wrong"), [(DOWN, SCALE), (SCALE, DOWN)])
def test_ones_or_experts_without_the_other_are_still_looked_at(tmp_path, missing, wrong):
    hf, nemo, back = both_layouts()
    del back[missing]
    back[wrong] = flip(back[wrong], 3, 0)
    result = checked(tmp_path, nemo, back, hf=hf)
    found = [(d.name, d.kind, d.index) for d in result.different]
    assert found == [(missing, "missing", None), (wrong, "values", place(3, back[wrong]))]
    assert result.equal == len(hf) - 2


def test_the_same_layout_in_another_spelling_keeps_every_bit(tmp_path):
    hf = random_hf_state_dict()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert checked(tmp_path, hf, legacy).different == ()
    name = legacy_name(SCALE)
    found = sole(judged(tmp_path, legacy | {name: flip(legacy[name], 1, 15)}, hf))
    assert (found.name, found.index, found.ulps) == (name, (1,), 2 * int(hf[SCALE].view(torch.int16)[1]))


def test_a_legacy_source(tmp_path):
    hf = random_hf_state_dict()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert checked(tmp_path, legacy, nemo_from_hf(hf), hf=hf).different == ()


def test_the_same_layout_in_another_dtype_is_different(tmp_path):
    hf = random_hf_state_dict()
    cast = {name: tensor.float() for name, tensor in hf.items()}
    assert {d.kind for d in checked(tmp_path, hf, cast).different} == {"dtype"}
