"""`exclude_key_regex` has one meaning: what `re.match` finds in an entry's hf name or in its nemo name is left out."""

from __future__ import annotations

import re

import pytest
import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import UnknownTensorError, UsageError
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.models import LAYER, random_hf_state_dict

ADAPTER = Gemma4MoEStateDictAdapter(None, None, None, dtype=torch.bfloat16)
NEMO = nemo_from_hf(random_hf_state_dict())

#: The regular expression, and the endings of the hf names that it leaves out.
MEANINGS = [
    (r".*moe\.gate.*", ("router.proj.weight", "router.scale")),
    (r".*router.*", ("router.proj.weight", "router.scale", "router.per_expert_scale")),
    (r".*down_projs", ("experts.down_proj", "router.per_expert_scale")),
    (r".*experts\.down_proj$", ("experts.down_proj",)),
    (r".*per_expert_scale", ("router.per_expert_scale",)),
    (r".*gate_and_up_projs$", ("experts.gate_up_proj",)),
    (r".*experts\.gate_up_proj", ("experts.gate_up_proj",)),
    (r".*moe\.experts", ("experts.gate_up_proj", "experts.down_proj", "router.per_expert_scale")),
    (r".*layer_scalar", ("layer_scalar",)),
    (r".*", ("",)),
    (r"", ("",)),
    (r"moe\.gate|per_expert_scale|experts", ()),
    (r".*_extra_state.*", ()),
]


def remaining(endings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """By formula: the hf state dict without the names of these endings."""
    return {name: tensor for name, tensor in hf_from_nemo(NEMO).items() if not name.endswith(endings)}


@pytest.mark.parametrize(("regex", "endings"), MEANINGS, ids=[regex for regex, _ in MEANINGS])
def test_every_method_leaves_out_the_same(regex: str, endings: tuple[str, ...]) -> None:
    expected = remaining(endings)
    assert_same_tensors(ADAPTER.to_hf(NEMO, exclude_key_regex=regex), expected)
    assert_same_tensors(ADAPTER.to_hf(iter(NEMO.items()), regex), expected)
    singly = [
        pair
        for name, tensor in NEMO.items()
        for pair in ADAPTER.convert_single_tensor_to_hf(name, tensor, exclude_key_regex=regex)
    ]
    assert_same_tensors(dict(singly), expected)
    views = ADAPTER.to_hf(NEMO, exclude_key_regex=regex, for_checkpoint_load=True)
    assert sorted(views) == sorted(expected)


def test_the_match_is_anchored_at_the_start_of_the_whole_name() -> None:
    assert list(ADAPTER.to_hf(NEMO, exclude_key_regex=r"layers\.0")) == list(ADAPTER.to_hf(NEMO))
    kept = ADAPTER.to_hf(NEMO, exclude_key_regex=re.escape(LAYER))
    assert kept
    assert not any(name.startswith(LAYER) for name in kept)


@pytest.mark.parametrize("regex", ["(", "*", "[z-a]", r"(?P<a>x)(?P<a>y)"])
def test_a_text_that_is_no_regular_expression_is_refused(regex: str) -> None:
    for call in (
        lambda: ADAPTER.to_hf(NEMO, exclude_key_regex=regex),
        lambda: ADAPTER.convert_single_tensor_to_hf("x", torch.ones(1), exclude_key_regex=regex),
    ):
        with pytest.raises(UsageError, match="not a regular expression") as raised:
            call()
        assert raised.value.facts["found"] == regex
        assert raised.value.hint


def test_a_tensor_that_no_row_explains_can_be_left_out_as_the_refusal_says() -> None:
    name = f"{LAYER}moe.experts.down_projs_bias"
    state = {**NEMO, name: torch.ones(6, 10)}
    with pytest.raises(UnknownTensorError) as raised:
        ADAPTER.to_hf(state)
    assert "exclude it" in str(raised.value.hint)
    assert_same_tensors(ADAPTER.to_hf(state, exclude_key_regex=r".*_bias$"), hf_from_nemo(NEMO))
    assert ADAPTER.convert_single_tensor_to_hf(name, state[name], exclude_key_regex=r".*_bias$") == []
    with pytest.raises(UnknownTensorError):
        ADAPTER.convert_single_tensor_to_hf(name, state[name], exclude_key_regex=r".*_scale$")
