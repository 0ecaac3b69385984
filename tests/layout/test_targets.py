"""Targets from names, shapes and dtypes: what is made, from which bytes, with which dtype; and at the real size."""

from time import perf_counter
from typing import NamedTuple

import pytest

from gemma4_moe.errors import InputError, TensorShapeError
from gemma4_moe.layout import dtypes, spellings
from gemma4_moe.layout.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.spellings.per_expert import PER_EXPERT
from gemma4_moe.layout.table import CHECKPOINT_RULES, EXPERT_RULES, Layout, Operation
from gemma4_moe.layout.targets import hf_tensors, targets_of
from support import forms
from support.sparse import real_names_and_shapes

E, H, I = 6, 10, 7  # noqa: E741
LAYER = "m.layers.0."


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: DType = BFLOAT16


HF = [
    Tensor(LAYER + "experts.gate_up_proj", (E, 2 * I, H)),
    Tensor(LAYER + "experts.down_proj", (E, H, I)),
    Tensor(LAYER + "router.per_expert_scale", (E,), FLOAT32),
    Tensor(LAYER + "router.proj.weight", (E, H)),
    Tensor(LAYER + "router.scale", (H,)),
    Tensor("m.count", (), dtypes.named("int64")),
    Tensor("m.norm.weight", (H,), FLOAT32),
]
NEMO = [
    Tensor(LAYER + "moe.experts.gate_and_up_projs", (E, H, 2 * I)),
    Tensor(LAYER + "moe.experts.down_projs", (E, I, H)),
    Tensor(LAYER + "moe.gate.proj.weight", (E, H)),
    Tensor(LAYER + "moe.gate.scale", (H,)),
    *HF[-2:],
]


def planned(tensors, layout, **how):
    return targets_of(tensors, Inventory(layout), CHECKPOINT_RULES[layout], **how)


def described(targets):
    return [(target.name, target.shape, target.dtype) for target in targets.values()]


def test_each_layout_becomes_the_other():
    found = planned(HF, Layout.HF)
    assert sorted(described(found)) == sorted((t.name, t.shape, t.dtype) for t in NEMO)
    down = found[LAYER + "moe.experts.down_projs"]
    assert down.stored == (HF[1], HF[2])
    assert (down.operation, down.scale, down.origin) == (Operation.TRANSPOSE_SCALE, HF[2], HF[1])
    back = planned(NEMO, Layout.NEMO)
    assert sorted(described(back)) == sorted(
        (t.name, t.shape, BFLOAT16 if "expert_scale" in t.name else t.dtype) for t in HF
    )
    ones = back[LAYER + "router.per_expert_scale"]
    assert (ones.source, ones.origin, ones.operation) == (None, NEMO[1], Operation.FOLD)


def test_a_cast_is_for_floating_point_tensors_and_the_scale_has_its_experts_dtype():
    for tensors, layout in ((HF, Layout.HF), (NEMO, Layout.NEMO)):
        found = planned(tensors, layout, cast=FLOAT16)
        assert {name for name, target in found.items() if target.dtype != FLOAT16} == {"m.count"}


def test_targets_are_in_natural_order_whatever_the_order_of_the_sources():
    tensors = [Tensor(f"layers.{n}.{t.name.removeprefix(LAYER)}", t.shape) for n in (10, 2, 0) for t in NEMO[:4]]
    names = [
        f"layers.{n}.{rest}"
        for n in (0, 2, 10)
        for rest in (
            "experts.down_proj",
            "experts.gate_up_proj",
            "router.per_expert_scale",
            "router.proj.weight",
            "router.scale",
        )
    ]
    assert list(planned(tensors, Layout.NEMO)) == list(planned(tensors[::-1], Layout.NEMO)) == names


def test_reads_say_where_each_byte_goes(monkeypatch):
    monkeypatch.setattr(spellings, "SPELLINGS", (*spellings.SPELLINGS, forms.BANKS, forms.SINGLE))

    def gate_up(tensors):
        return planned([*tensors, *HF[1:]], Layout.HF)[LAYER + "moe.experts.gate_and_up_projs"]

    assert reads(gate_up(HF[:1]), 2, 5) == [(HF[0].name, 2 * 280, 5 * 280, (2, 5), (0, 14))]
    unfused = gate_up([Tensor(f"{LAYER}ffn.bank.{half}", (E, I, H)) for half in ("up", "gate")])
    assert unfused.source.shape == (E, 2 * I, H)
    assert reads(unfused, 2, 5) == [
        (LAYER + "ffn.bank.gate", 2 * 140, 5 * 140, (2, 5), (0, 7)),
        (LAYER + "ffn.bank.up", 2 * 140, 5 * 140, (2, 5), (7, 14)),
    ]
    single = gate_up(
        [Tensor(f"{LAYER}moe.w{e}.{half}", (I, H)) for half in ("three", "one") for e in (3, 1, 5, 0, 4, 2)]
    )
    assert reads(single, 2, 4) == [
        (f"{LAYER}moe.w{e}.{half}", 0, 140, (e, e + 1), rows)
        for e in (2, 3)
        for half, rows in (("one", (0, 7)), ("three", (7, 14)))
    ]
    assert [name for name, *_ in reads(single, 5, 6)] == [LAYER + "moe.w5.one", LAYER + "moe.w5.three"]


def reads(target, first, last):
    found = target.source.reads(first, last)
    return [(read.stored.name, read.start, read.end, read.experts, read.rows) for read in found]


def test_what_has_no_experts_is_read_by_elements():
    others = [Tensor("m.empty", (0, 3)), Tensor("m.packed", (5, 4), dtypes.BY_TAG["F4"])]
    found = planned([*HF, *others], Layout.HF)
    for name, first, last, expected in (
        ("m.norm.weight", 3, 10, [(12, 40)]),
        ("m.count", 0, 1, [(0, 8)]),
        ("m.empty", 0, 0, []),
        ("m.packed", 2, 10, [(2, 10)]),
    ):
        assert [read[1:3] for read in reads(found[name], first, last)] == expected, name


def test_one_tensor_an_expert_is_written_in_the_order_of_the_roles():
    found = planned(NEMO, Layout.NEMO, spelling=PER_EXPERT)
    expected = [f"{LAYER}experts.{e}.down_proj.weight" for e in range(E)]
    expected += [f"{LAYER}experts.{e}.{half}_proj.weight" for e in range(E) for half in ("gate", "up")]
    assert [name for name in found if "experts" in name] == expected
    assert {found[name].shape for name in expected} == {(H, I), (I, H)}
    assert all(found[name].origin in NEMO[:2] for name in expected)


def test_what_is_wrong_is_raised_before_anything_is_made():
    with pytest.raises(TensorShapeError):
        planned([*HF[:1], Tensor(HF[1].name, (E, I, H)), *HF[2:]], Layout.HF)
    with pytest.raises(InputError, match="scale missing"):
        targets_of([*HF[:2], *HF[3:]], Inventory(Layout.HF), EXPERT_RULES[Layout.HF])


def test_the_hf_names_of_a_native_tensor():
    inventory = Inventory(Layout.NEMO)
    names = {t.name: [hf for hf, _ in hf_tensors(inventory.add(t.name, t.shape), t.name)] for t in NEMO}
    assert names[LAYER + "moe.experts.down_projs"] == [LAYER + "experts.down_proj", LAYER + "router.per_expert_scale"]
    assert names["m.count"] == ["m.count"]
    assert sorted(name for found in names.values() for name in found) == sorted(tensor.name for tensor in HF)


def test_the_real_model_with_one_tensor_an_expert_is_planned_in_two_seconds(monkeypatch):
    monkeypatch.setattr(spellings, "SPELLINGS", (*spellings.SPELLINGS, forms.SINGLE))
    tensors = []
    for name, shape in real_names_and_shapes().items():
        path, _, last = name.rpartition("experts.")
        if last == "gate_up_proj":
            half = (shape[1] // 2, shape[2])
            tensors += [Tensor(f"{path}moe.w{e}.{part}", half) for part in ("one", "three") for e in range(shape[0])]
        elif last == "down_proj":
            tensors += [Tensor(f"{path}moe.w{e}.two.weight", tuple(shape[1:])) for e in range(shape[0])]
        else:
            tensors.append(Tensor(name, tuple(shape)))
    assert sum(".moe.w" in tensor.name for tensor in tensors) == 11_520
    start = perf_counter()
    found = planned(tensors, Layout.HF)
    seconds = perf_counter() - start
    assert len(found) == len(real_names_and_shapes()) - 30
    assert seconds < 2
