"""`WeightStream(lora=...)`: merged weights, or the adapter in vLLM's form. Expected values are fp64 loops and files."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gemma4_moe import WeightStream, convert_lora
from gemma4_moe.errors import InputError, TensorShapeError, UnknownTensorError, UsageError
from support import ranks
from support.adapters import PREFIX, native_config, random_native, write_adapter
from support.streams import ADAPTER, assert_same_stream, copied, nemo_state

E, H, I, R, RANK, ALPHA = 6, 10, 7, 3, 5, 9  # noqa: E741
LAYERS = "model.language_model.layers."
MERGED = {"lora": "merged", "lora_alpha": ALPHA}


def states(dtype=torch.bfloat16):
    """A native state of two layers, and the same with NeMo's LoRA parameters."""
    plain = nemo_state(layers=2, dtype=dtype)
    for layer in (0, 1):
        plain[f"{LAYERS}{layer}.self_attn.q_proj.weight"] = torch.ones(12, H, dtype=dtype) / 3
        plain[f"{LAYERS}{layer}.mlp.down_proj.weight"] = torch.ones(H, 9, dtype=dtype) / 7
    lora = {name.removeprefix(PREFIX): t / 4 for name, t in random_native().items()}
    return plain, plain | lora


def exact(plain, both, dtype):
    """Each changed native weight in fp64, rounded to fp32 and then to its dtype."""
    result = dict(plain)
    for name in both:
        if name.endswith("_A"):
            own = name.removesuffix("A")
            weight = own.replace("lora_gate_and_up_", "gate_and_up_projs").replace("lora_down_", "down_projs")
            change = both[name].double() @ both[f"{own}B"].double() * ALPHA / R
        elif name.endswith("lora_A.weight"):
            weight = name.replace("lora_A.", "")
            change = both[name.replace("lora_A", "lora_B")].double() @ both[name].double() * ALPHA / RANK
        else:
            continue
        result[weight] = (plain[weight].double() + change).float().to(dtype or plain[weight].dtype)
    return result


def assert_close(found, expected):
    """The same names and dtypes; almost all bits, the rest one step of the dtype away."""
    found, expected = list(found), list(expected)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, one), (_, two) in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape), name
        if one.dtype == torch.float32:
            assert torch.allclose(one, two, rtol=2e-6, atol=2e-6), name
        else:
            assert torch.allclose(one.float(), two.float(), rtol=2**-7, atol=1e-6), name
            assert (one == two).float().mean() > 0.98, name


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
def test_merged_weights_are_the_exact_ones_rounded_once(own, dtype, experts, monkeypatch):
    monkeypatch.setattr("gemma4_moe.refit.lora._PIECE", 2 * H * 2 * I)
    plain, both = states(own)
    expected = [*WeightStream(exact(plain, both, dtype), ADAPTER, experts=experts, dtype=dtype)]
    stream = WeightStream(both, ADAPTER, experts=experts, dtype=dtype, bucket_bytes=10**6, **MERGED)
    assert_close(stream, expected)
    assert_same_stream(copied(stream.buckets()), stream)
    assert [each.name for each in stream.plan()] == [name for name, _ in expected]
    before = [*WeightStream(plain, ADAPTER, experts=experts, dtype=dtype)]
    changed = sum(not torch.equal(one, two) for (_, one), (_, two) in zip(before, stream, strict=True))
    assert changed == (2 * (2 + 2) if experts == "fused" else 2 * (3 * E + 2))


def test_a_state_that_trains_on_is_read_again():
    _, both = states(torch.float32)
    stream = WeightStream(both, ADAPTER, **MERGED)
    name = f"{LAYERS}1.experts.gate_up_proj"
    first = dict(stream)[name]
    both[f"{LAYERS}1.moe.experts.lora_gate_and_up_B"] *= 0
    assert not torch.equal(dict(stream)[name], first)
    assert torch.equal(dict(stream)[name], both[f"{LAYERS}1.moe.experts.gate_and_up_projs"].mT)


def test_separately_the_adapter_is_that_of_a_converted_directory(tmp_path):
    plain, both = states()
    stream = WeightStream(both, ADAPTER, lora="separate", lora_alpha=ALPHA)
    assert_same_stream(stream, WeightStream(plain, ADAPTER))
    state = {PREFIX + name: both[name] for name in both.keys() - plain.keys()}
    write_adapter(tmp_path / "native", state, native_config(RANK, ALPHA), {"moe_rank_scaling": True})
    ones = {f"{LAYERS}{n}.router.per_expert_scale": torch.ones(E) for n in (0, 1)}
    convert_lora(tmp_path / "native", tmp_path / "vllm", to="vllm", base=ones)
    expected = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    found = dict(stream.lora_tensors())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous()


def test_by_default_it_is_refused_and_both_ways_are_named():
    with pytest.raises(InputError) as caught:
        WeightStream(states()[1], ADAPTER)
    assert 'lora="merged"' in caught.value.hint
    assert 'lora="separate"' in caught.value.hint


def refused(error, match, *, change=None, drop=(), **arguments):
    _, both = states()
    state = {name: tensor for name, tensor in (both | (change or {})).items() if name not in drop}
    with pytest.raises(error, match=match):
        WeightStream(state, ADAPTER, **(MERGED | arguments))


def test_what_does_not_fit_is_refused_by_name():
    lora = f"{LAYERS}0.self_attn.q_proj.lora_"
    refused(UsageError, "without its scaling", lora_alpha=None)
    refused(UsageError, "no such value of lora", lora="both")
    refused(UnknownTensorError, "without its weight", drop=[f"{lora}B.weight"])
    refused(UnknownTensorError, "without its weight", drop=[f"{LAYERS}0.self_attn.q_proj.weight"])
    refused(TensorShapeError, "does not fit", change={f"{lora}B.weight": torch.ones(11, RANK)})
    refused(TensorShapeError, "does not fit", change={f"{LAYERS}0.moe.experts.lora_down_B": torch.ones(E, R + 1, H)})
    refused(UnknownTensorError, "another form", change={f"{LAYERS}0.experts.lora_A.weight": torch.ones(E * R, I)})
    plain, both = states()
    parts = [plain, {name: both[name] for name in both.keys() - plain.keys()}]
    with pytest.raises(UsageError, match="beside its weight"):
        WeightStream(parts, ADAPTER, **MERGED)


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_gets_the_stream_of_one_process(world):
    ranks.run(world, check_sharded, world)


def check_sharded(world):
    _, both = states()
    expected = [*WeightStream(both, ADAPTER, **MERGED)]
    tensors = dict(WeightStream(both, ADAPTER, lora="separate", lora_alpha=ALPHA).lora_tensors())
    if world == 2:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
        ways = [[Shard(0)]]
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep"))
        ways = [[Shard(1), Shard(0)]]
    for placements in ways:
        sharded = {
            name: distribute_tensor(tensor, mesh, placements, src_data_rank=None) if ".moe.experts." in name else tensor
            for name, tensor in both.items()
        }
        for experts in ("fused", "per-expert"):
            whole = expected if experts == "fused" else [*WeightStream(both, ADAPTER, experts=experts, **MERGED)]
            stream = WeightStream(sharded, ADAPTER, experts=experts, **MERGED)
            assert_close(stream, whole)
            assert_close(copied(stream.buckets()), whole)
        found = dict(WeightStream(sharded, ADAPTER, lora="separate", lora_alpha=ALPHA).lora_tensors())
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
