"""Names without wrappers: at the start, inside, several at once; and two that become one."""

import json
from pathlib import Path

import pytest

from gemma4_moe.errors import DuplicateTensorError
from gemma4_moe.layout.wrappers import plain_state, unwrapped, without_wrappers, wrappers_in

REAL = Path(__file__).parents[1] / "data" / "gemma-4-26B-A4B" / "inventory.json"


@pytest.mark.parametrize(
    ("name", "plain", "found"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight", ["_orig_mod"]),
        ("module.model.norm.weight", "model.norm.weight", ["module"]),
        ("module._orig_mod.module.a", "a", ["module", "_orig_mod"]),
        ("model.layers.0._checkpoint_wrapped_module.mlp.w", "model.layers.0.mlp.w", ["_checkpoint_wrapped_module"]),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b", ["_fsdp_wrapped_module"]),
        ("model.submodule.module_list.my_orig_mod.w", "model.submodule.module_list.my_orig_mod.w", []),
        ("", "", []),
    ],
)
def test_components_are_removed_wherever_they_are(name, plain, found):
    assert without_wrappers(name) == plain
    assert wrappers_in(name) == found


def test_two_names_that_become_one_are_named():
    with pytest.raises(DuplicateTensorError, match=r"(?s)_orig_mod\.a.*one name for a.*also module\.a"):
        unwrapped(["b", "module.a", "_orig_mod.a"])


def test_a_state_keeps_its_order_and_loses_extra_state():
    state = {"module.b": 1, "a": 2, "module.c._extra_state": 3, "c._extra_state_0": 4}
    assert list(plain_state(state).items()) == [("b", 1), ("a", 2)]


def test_no_tensor_of_the_real_model_has_such_a_component():
    assert not [name for name in json.loads(REAL.read_text())["shapes"] if wrappers_in(name)]
