"""Each law has been seen to fail: here the code is broken on purpose, once for each way, and the law must notice."""

import sys
from typing import Any

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter, kernels
from gemma4_moe.errors import DuplicateTensorError
from gemma4_moe.layout import names, spellings
from gemma4_moe.layout.spellings.fused import LEGACY
from gemma4_moe.layout.table import ROUTER_SCALE
from properties import test_adapter_laws as laws
from properties.test_adapter_laws import Model

BF16, FP32 = torch.bfloat16, torch.float32
NARROW = Model(6, 10, 7, file=BF16, scale=FP32, target=BF16, prefix="tower.", layers=(3, 11), seed=5)
WIDE = Model(6, 10, 7, file=BF16, scale=BF16, target=FP32, prefix="tower.", layers=(3, 11), seed=5)

convert = kernels.transpose_scale_cast
fold_in_place = kernels.scale_in_place


def of_scales(change):
    return lambda x, *, scale=None, **how: convert(x, scale=None if scale is None else change(scale), **how)


def of_values(change):
    return lambda x, **how: convert(change(x), **how)


def of_the_way_back(change):
    return lambda x, *, dtype=None, **how: (change if dtype is None else convert)(x, dtype=dtype, **how)


def product_is_rounded_before_the_cast(x, *, scale=None, dtype=None, **how):
    if scale is None:
        return convert(x, dtype=dtype, **how)
    return (x * scale.to(x.dtype)[:, None, None]).mT.to(dtype).contiguous()


def gate_and_up_are_exchanged(x, **how):
    found = convert(x, **how)
    rows = found.shape[1]
    return torch.roll(found, rows // 2, 1) if rows % 2 == 0 else found


class ThatOfTheCallBefore:
    """A fold with a memory: what came before decides."""

    before: Any = None

    def __call__(self, scale):
        used, self.before = self.before, scale
        return scale if used is None else used


KERNELS = {
    "scale is forgotten": of_scales(torch.ones_like),
    "scale is rounded first": of_scales(lambda scale: scale.to(BF16)),
    "product is rounded before the cast": product_is_rounded_before_the_cast,
    "experts are exchanged": of_scales(lambda scale: scale.flip(0)),
    "scale is relative to the first": of_scales(lambda scale: scale / scale[0]),
    "scale is that of the call before": of_scales(ThatOfTheCallBefore()),
    "gate and up are exchanged": of_the_way_back(gate_and_up_are_exchanged),
    "memory is reinterpreted": of_the_way_back(lambda x, **how: convert(x.mT.reshape(x.shape), **how)),
    "subnormals are flushed": of_values(lambda x: torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x)),
    "every NaN is the same": of_values(lambda x: torch.where(x.isnan(), torch.full_like(x, float("nan")), x)),
    "minus zero is lost": of_values(lambda x: x + 0),
}
FOLDS = {
    "fold is forgotten": lambda x, *_, **__: x,
    "fold rounds the scale first": lambda x, scale, **how: fold_in_place(x, scale.to(BF16).float(), **how),
}
BROKEN = [
    (laws.hf_to_nemo_is_the_formula, "scale is forgotten", NARROW),
    (laws.hf_to_nemo_is_the_formula, "scale is rounded first", NARROW),
    (laws.hf_to_nemo_is_the_formula, "product is rounded before the cast", WIDE),
    (laws.hf_to_nemo_is_the_formula, "experts are exchanged", NARROW),
    (laws.hf_to_nemo_is_the_formula, "minus zero is lost", WIDE),
    (laws.hf_to_nemo_is_the_formula, "subnormals are flushed", WIDE),
    (laws.nemo_to_hf_is_the_formula, "gate and up are exchanged", NARROW),
    (laws.nemo_to_hf_is_the_formula, "memory is reinterpreted", WIDE),
    (laws.nemo_to_hf_to_nemo_is_bit_exact, "gate and up are exchanged", WIDE),
    (laws.nemo_to_hf_to_nemo_is_bit_exact, "every NaN is the same", NARROW),
    (laws.nemo_to_hf_to_nemo_is_bit_exact, "subnormals are flushed", WIDE),
    (laws.slicing_experts_and_converting_commute, "scale is relative to the first", NARROW),
    (laws.slicing_experts_and_converting_commute, "experts are exchanged", NARROW),
    (laws.the_order_of_entries_is_free, "scale is that of the call before", NARROW),
    (laws.loading_in_place_is_loading_in_memory, "fold is forgotten", WIDE),
    (laws.loading_in_place_is_loading_in_memory, "fold rounds the scale first", NARROW),
]


@pytest.mark.parametrize(("law", "fault", "model"), BROKEN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_broken_kernel_breaks_the_law(monkeypatch, law, fault, model):
    whole, broken = (fold_in_place, FOLDS[fault]) if fault in FOLDS else (convert, KERNELS[fault])
    for module in [module for name, module in sys.modules.items() if name.startswith("gemma4_moe")]:
        if vars(module).get(whole.__name__) is whole:
            monkeypatch.setattr(module, whole.__name__, broken)
    with pytest.raises(AssertionError, match="differs in its bits"):
        law(model)


def test_a_prefix_that_is_rewritten_breaks_its_law(monkeypatch):
    rewritten = property(lambda name: f"model.language_model.layers.{name.layer}.")
    monkeypatch.setattr(names.MoEName, "layer_path", rewritten)
    with pytest.raises(AssertionError):
        laws.every_name_keeps_its_prefix(NARROW)


def test_a_legacy_spelling_that_means_another_row_breaks_its_law(monkeypatch):
    monkeypatch.setattr(names, "_lookup", names._lookup.__wrapped__)
    monkeypatch.setitem(spellings._known(spellings.SPELLINGS), "moe.down_proj", (LEGACY, ROUTER_SCALE, 0, 1))
    with pytest.raises(DuplicateTensorError):
        laws.the_legacy_spelling_means_the_same(NARROW)


def test_a_single_tensor_that_loses_its_scale_breaks_its_law(monkeypatch):
    whole = Gemma4MoEStateDictAdapter.convert_single_tensor_to_hf
    monkeypatch.setattr(
        Gemma4MoEStateDictAdapter, "convert_single_tensor_to_hf", lambda *given, **more: whole(*given, **more)[:1]
    )
    with pytest.raises(AssertionError):
        laws.tensor_by_tensor_is_the_whole(NARROW)


def test_every_law_holds_for_these_models_and_is_broken_above():
    for law in laws.LAWS:
        law(NARROW)
        law(WIDE)
    others = {laws.every_name_keeps_its_prefix, laws.the_legacy_spelling_means_the_same}
    broken = {law for law, *_ in BROKEN} | others | {laws.tensor_by_tensor_is_the_whole}
    assert broken == set(laws.LAWS)
