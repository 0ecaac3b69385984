"""Each law has been seen to fail: here the code is broken on purpose, once for each way, and the law must notice."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter, kernels
from gemma4_moe.errors import DuplicateTensorError
from gemma4_moe.layout import names
from gemma4_moe.layout.spellings.base import WHOLE
from gemma4_moe.layout.spellings.fused import LEGACY
from gemma4_moe.layout.table import ROUTER_SCALE
from properties.adapter_laws import (
    LAWS,
    Model,
    every_name_keeps_its_prefix,
    hf_to_nemo_is_the_formula,
    loading_in_place_is_loading_in_memory,
    nemo_to_hf_is_the_formula,
    nemo_to_hf_to_nemo_is_bit_exact,
    slicing_experts_and_converting_commute,
    tensor_by_tensor_is_the_whole,
    the_legacy_spelling_means_the_same,
    the_order_of_entries_is_free,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BF16, FP32 = torch.bfloat16, torch.float32
NARROW = Model(6, 10, 7, file=BF16, scale=FP32, target=BF16, prefix="tower.", layers=(3, 11), seed=5)
WIDE = Model(6, 10, 7, file=BF16, scale=BF16, target=FP32, prefix="tower.", layers=(3, 11), seed=5)

convert = kernels.transpose_scale_cast
fold_in_place = kernels.scale_in_place


def scale_is_forgotten(x: Any, *, scale: Any = None, **how: Any) -> Any:
    return convert(x, **how)


def scale_is_rounded_first(x: Any, *, scale: Any = None, **how: Any) -> Any:
    return convert(x, scale=None if scale is None else scale.to(BF16), **how)


def product_is_rounded_before_the_cast(x: Any, *, scale: Any = None, dtype: Any = None, **how: Any) -> Any:
    if scale is None:
        return convert(x, dtype=dtype, **how)
    return (x * scale.to(x.dtype)[:, None, None]).mT.to(dtype).contiguous()


def experts_are_exchanged(x: Any, *, scale: Any = None, **how: Any) -> Any:
    return convert(x, scale=None if scale is None else scale.flip(0), **how)


def scale_is_relative_to_the_first(x: Any, *, scale: Any = None, **how: Any) -> Any:
    return convert(x, scale=None if scale is None else scale / scale[0], **how)


def gate_and_up_are_exchanged_on_the_way_back(x: Any, *, dtype: Any = None, **how: Any) -> Any:
    found = convert(x, dtype=dtype, **how)
    rows = found.shape[1]
    return torch.roll(found, rows // 2, 1) if dtype is None and rows % 2 == 0 else found


def memory_is_reinterpreted_and_not_transposed(x: Any, *, dtype: Any = None, **how: Any) -> Any:
    return convert(x.mT.reshape(x.shape), dtype=dtype, **how) if dtype is None else convert(x, dtype=dtype, **how)


def subnormals_are_flushed(x: Any, **how: Any) -> Any:
    tiny = torch.finfo(x.dtype).tiny
    return convert(torch.where(x.abs() < tiny, torch.zeros_like(x), x), **how)


def every_nan_is_the_same(x: Any, **how: Any) -> Any:
    return convert(torch.where(x.isnan(), torch.full_like(x, float("nan")), x), **how)


def minus_zero_is_lost(x: Any, **how: Any) -> Any:
    return convert(x + 0, **how)


class ScaleOfTheCallBefore:
    """A fold with a memory: what came before decides."""

    def __init__(self) -> None:
        self._before: Any = None

    def __call__(self, x: Any, *, scale: Any = None, **how: Any) -> Any:
        used, self._before = self._before, scale
        return convert(x, scale=scale if used is None or scale is None else used, **how)


def fold_is_forgotten(x: Any, scale: Any, **how: Any) -> Any:
    return x


def fold_rounds_the_scale_first(x: Any, scale: Any, **how: Any) -> Any:
    return fold_in_place(x, scale.to(BF16).float(), **how)


BROKEN_KERNELS: list[tuple[Callable[[Model], None], Callable[..., Any], Model]] = [
    (hf_to_nemo_is_the_formula, scale_is_forgotten, NARROW),
    (hf_to_nemo_is_the_formula, scale_is_rounded_first, NARROW),
    (hf_to_nemo_is_the_formula, product_is_rounded_before_the_cast, WIDE),
    (hf_to_nemo_is_the_formula, experts_are_exchanged, NARROW),
    (hf_to_nemo_is_the_formula, minus_zero_is_lost, WIDE),
    (hf_to_nemo_is_the_formula, subnormals_are_flushed, WIDE),
    (nemo_to_hf_is_the_formula, gate_and_up_are_exchanged_on_the_way_back, NARROW),
    (nemo_to_hf_is_the_formula, memory_is_reinterpreted_and_not_transposed, WIDE),
    (nemo_to_hf_to_nemo_is_bit_exact, gate_and_up_are_exchanged_on_the_way_back, WIDE),
    (nemo_to_hf_to_nemo_is_bit_exact, every_nan_is_the_same, NARROW),
    (nemo_to_hf_to_nemo_is_bit_exact, subnormals_are_flushed, WIDE),
    (slicing_experts_and_converting_commute, scale_is_relative_to_the_first, NARROW),
    (slicing_experts_and_converting_commute, experts_are_exchanged, NARROW),
    (the_order_of_entries_is_free, ScaleOfTheCallBefore(), NARROW),
    (loading_in_place_is_loading_in_memory, fold_is_forgotten, WIDE),
    (loading_in_place_is_loading_in_memory, fold_rounds_the_scale_first, NARROW),
]


@pytest.mark.parametrize(
    ("law", "broken", "model"),
    BROKEN_KERNELS,
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_broken_kernel_breaks_the_law(
    monkeypatch: pytest.MonkeyPatch, law: Callable[[Model], None], broken: Callable[..., Any], model: Model
) -> None:
    whole = fold_in_place if broken in (fold_is_forgotten, fold_rounds_the_scale_first) else convert
    for module in [module for name, module in sys.modules.items() if name.startswith("gemma4_moe")]:
        if vars(module).get(whole.__name__) is whole:
            monkeypatch.setattr(module, whole.__name__, broken)
    with pytest.raises(AssertionError, match="differs in its bits"):
        law(model)


def test_a_prefix_that_is_rewritten_breaks_its_law(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = property(lambda name: f"model.language_model.layers.{name.layer}.")
    monkeypatch.setattr(names.MoEName, "layer_path", rewritten)
    with pytest.raises(AssertionError):
        every_name_keeps_its_prefix(NARROW)


def test_a_legacy_spelling_that_means_another_row_breaks_its_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEGACY._fixed, "moe.down_proj", (ROUTER_SCALE, WHOLE))
    with pytest.raises(DuplicateTensorError):
        the_legacy_spelling_means_the_same(NARROW)


def test_a_single_tensor_that_loses_its_scale_breaks_its_law(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Gemma4MoEStateDictAdapter.convert_single_tensor_to_hf
    monkeypatch.setattr(
        Gemma4MoEStateDictAdapter, "convert_single_tensor_to_hf", lambda *given, **more: whole(*given, **more)[:1]
    )
    with pytest.raises(AssertionError):
        tensor_by_tensor_is_the_whole(NARROW)


def test_every_law_holds_for_these_models_and_is_broken_above() -> None:
    for law in LAWS:
        law(NARROW)
        law(WIDE)
    broken = {law for law, *_ in BROKEN_KERNELS}
    others = {every_name_keeps_its_prefix, the_legacy_spelling_means_the_same, tensor_by_tensor_is_the_whole}
    assert broken | others == set(LAWS)
