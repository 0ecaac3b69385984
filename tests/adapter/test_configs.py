"""Sizes from whatever a framework gives as configuration."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import transformers

from gemma4_moe.adapter import BackendConfig, MoEConfig
from gemma4_moe.adapter.configs import axis_sizes, conversion_of
from gemma4_moe.errors import ConfigError, UsageError

TEXT = SimpleNamespace(num_experts=6, hidden_size=10, moe_intermediate_size=7)
GEMMA = vars(TEXT) | {"enable_moe_block": True}
PEER = SimpleNamespace(n_routed_experts=6, dim=10, moe_inter_dim=7, inter_dim=99, n_shared_experts=0)


@pytest.mark.parametrize(
    ("config", "moe_config", "sizes"),
    [
        (None, None, {}),
        (object(), object(), {}),
        (None, SimpleNamespace(n_routed_experts=6), {"E": 6}),
        (None, MoEConfig(6), {"E": 6}),
        (None, MoEConfig(n_routed_experts=6, dim=10, moe_inter_dim=7), {"E": 6, "H": 10, "I": 7}),
        (None, PEER, {"E": 6, "H": 10, "I": 7}),
        (TEXT, None, {"E": 6, "H": 10, "I": 7}),
        (TEXT, PEER, {"E": 6, "H": 10, "I": 7}),
        (SimpleNamespace(text_config=TEXT), MoEConfig(6), {"E": 6, "H": 10, "I": 7}),
        (SimpleNamespace(text_config=TEXT, hidden_size=99), None, {"E": 6, "H": 99, "I": 7}),
        (SimpleNamespace(text_config=TEXT, hidden_size=None), None, {"E": 6, "H": 10, "I": 7}),
        (vars(TEXT), vars(PEER), {"E": 6, "H": 10, "I": 7}),
        ({"text_config": vars(TEXT)}, None, {"E": 6, "H": 10, "I": 7}),
        (Mock(), Mock(), {}),
        (Mock(num_experts=6), Mock(n_routed_experts=6, dim=10), {"E": 6, "H": 10}),
        (SimpleNamespace(num_experts=np.int64(6), hidden_size=np.int32(10)), None, {"E": 6, "H": 10}),
        (SimpleNamespace(text_config=None, hidden_size=10), None, {"H": 10}),
        (SimpleNamespace(hidden_size=10, num_experts=None), MoEConfig(6), {"E": 6, "H": 10}),
        (transformers.Gemma4TextConfig(**GEMMA), None, {"E": 6, "H": 10, "I": 7}),
        (transformers.Gemma4Config(text_config=GEMMA), None, {"E": 6, "H": 10, "I": 7}),
    ],
)
def test_sizes_are_read_wherever_they_stand(config, moe_config, sizes):
    assert axis_sizes(config, moe_config) == sizes


@pytest.mark.parametrize(
    ("moe_config", "axis", "found"),
    [
        (MoEConfig(8), "E", "n_routed_experts = 8"),
        (MoEConfig(6, dim=11), "H", "dim = 11"),
        (MoEConfig(6, moe_inter_dim=14), "I", "moe_inter_dim = 14"),
    ],
)
def test_configs_that_disagree_are_refused(moe_config, axis, found):
    with pytest.raises(ConfigError, match=f"disagree about {axis}") as raised:
        axis_sizes(TEXT, moe_config)
    assert raised.value.facts["found"] == found


@pytest.mark.parametrize("value", [True, 6.0, "6", [6], float("nan"), None])
def test_a_value_that_is_no_integer_counts_as_absent(value):
    assert axis_sizes(SimpleNamespace(num_experts=value), SimpleNamespace(n_routed_experts=value)) == {}
    assert axis_sizes(SimpleNamespace(num_experts=value, text_config=TEXT), None)["E"] == 6


@pytest.mark.parametrize("value", [0, -1])
def test_a_size_less_than_one_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="num_experts is no size") as raised:
        axis_sizes(SimpleNamespace(num_experts=value), None)
    assert raised.value.facts["found"] == repr(value)
    with pytest.raises(ConfigError, match="n_routed_experts is no size"):
        axis_sizes(None, SimpleNamespace(n_routed_experts=value))


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        (None, "auto"),
        (Mock(), "auto"),
        (SimpleNamespace(conversion=None), "auto"),
        ({"conversion": "torch"}, "torch"),
        (SimpleNamespace(experts="torch"), "auto"),
        (BackendConfig(), "auto"),
        (BackendConfig(conversion="torch"), "torch"),
        (SimpleNamespace(conversion="triton"), "triton"),
        (SimpleNamespace(conversion="cpu"), "cpu"),
    ],
)
def test_the_backend_names_the_kernel(backend, kernel):
    assert conversion_of(backend) == kernel


@pytest.mark.parametrize("name", ["cuda", ""])
def test_a_kernel_that_does_not_exist_is_refused(name):
    with pytest.raises(UsageError, match="unknown kernel") as raised:
        conversion_of(SimpleNamespace(conversion=name))
    assert raised.value.facts == {"expected": "one of auto, cpu, triton, torch", "found": repr(name)}
