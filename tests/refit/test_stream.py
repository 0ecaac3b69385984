"""The stream: names, order, shapes, dtypes and bits of `convert --to hf`, whatever the state is given as."""

import json
import weakref

import pytest
import torch

from gemma4_moe import convert, plan
from gemma4_moe.errors import IncompleteExpertsError, InputError, UsageError
from gemma4_moe.refit import WeightStream
from support.checkpoints import config_of, write_checkpoint
from support.formulas import nemo_from_hf
from support.models import module_of, random_hf_state_dict, read_directory
from support.streams import ADAPTER, E, H, I, assert_same_stream, expected_stream, nemo_state

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("dtype", "cast"), [(BF16, None), (FP32, "bfloat16"), (BF16, "float32"), (FP32, "float16")])
def test_it_equals_convert_to_hf(tmp_path, dtype, cast):
    hf = random_hf_state_dict(layers=12, E=E, H=H, I=I, dtype=dtype)
    nemo = nemo_from_hf(hf)
    native = write_checkpoint(tmp_path / "nemo", nemo, config_of(hf))
    convert(native, tmp_path / "hf", to="hf", dtype=cast or "keep")
    expected = read_directory(tmp_path / "hf")
    stream = WeightStream(nemo, ADAPTER, dtype=cast)
    assert [planned.name for planned in stream.plan()] == list(plan(native, dtype=cast or "keep").plan.tensors)
    assert_same_stream(stream, [(planned.name, expected[planned.name]) for planned in stream.plan()])


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_the_plan_equals_the_stream_and_is_json_and_needs_no_values(experts):
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER, experts=experts, dtype=FP32)
    found = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes) for name, t in stream]
    assert stream.plan() == found
    assert json.loads(json.dumps(stream.plan())) == [[n, list(s), d, b] for n, s, d, b in found]
    meta = {name: tensor.to("meta") for name, tensor in nemo.items()}
    assert WeightStream(meta, ADAPTER, experts=experts, dtype=FP32).plan() == stream.plan()


def test_every_pass_is_fresh_and_reads_the_values_anew():
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER)
    list(stream)
    for tensor in nemo.values():
        tensor.neg_()
    assert_same_stream(stream, expected_stream(nemo))


def test_a_tensor_is_the_consumers_alone():
    nemo = nemo_state()
    stream = iter(WeightStream(nemo, ADAPTER))
    gone = []
    for _, tensor in stream:
        tensor.fill_(3.0)  # not the model's memory
        gone.append(weakref.ref(tensor))
        del tensor
        assert gone[-1]() is None
    assert_same_stream(WeightStream(nemo, ADAPTER), expected_stream(nemo_state()))


class ByLayer:
    """A state that is made mapping by mapping, on every pass."""

    def __init__(self, nemo):
        self.nemo = nemo

    def __iter__(self):
        for part in ("embed_tokens", *(f".layers.{layer}." for layer in range(3))):
            yield {name: tensor for name, tensor in self.nemo.items() if part in name}


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("cast", [None, torch.float16])
def test_one_mapping_or_one_a_layer_gives_the_formula(experts, dtype, cast):
    nemo = nemo_state(dtype=dtype)
    for state in (nemo, ByLayer(nemo)):
        stream = WeightStream(state, ADAPTER, dtype=cast, experts=experts)
        for _ in range(2):
            assert_same_stream(stream, expected_stream(nemo, experts=experts, dtype=cast))


class WithExtraState(torch.nn.Module):
    def get_extra_state(self):
        return b"no tensor"


@pytest.mark.filterwarnings("ignore")
def test_a_module_gives_its_buffers_and_a_tied_tensor_once_and_no_extra_state():
    nemo = nemo_state()
    model = module_of(nemo)
    model.lm_head = WithExtraState()
    model.lm_head.weight = model.get_parameter("model.language_model.embed_tokens.weight")
    assert sum(name.endswith("layer_scalar") for name, _ in model.named_buffers()) == 3
    assert "lm_head._extra_state" in model.state_dict()
    assert_same_stream(WeightStream(model, ADAPTER), expected_stream(nemo))


def test_some_layers_only():
    nemo = nemo_state() | {"model.vision_tower.layers.1.weight": torch.ones(3)}
    expected = [(n, t) for n, t in expected_stream(nemo_state()) if ".layers.1." in n]
    assert_same_stream(WeightStream(nemo, ADAPTER, layers=[1]), expected)
    with pytest.raises(UsageError, match="no such layer"):
        WeightStream(nemo, ADAPTER, layers=[1, 3])


def test_names_that_a_regex_matches_are_left_out():
    nemo = nemo_state()
    expected = [(n, t) for n, t in expected_stream(nemo) if "router." not in n or "per_expert" in n]
    assert_same_stream(WeightStream(nemo, ADAPTER, exclude_key_regex=r".*moe\.gate\."), expected)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_a_prefix_is_kept(prefix):
    nemo = nemo_state(prefix=prefix)
    assert_same_stream(WeightStream(nemo, ADAPTER), expected_stream(nemo))


def test_other_dtypes_pass_as_they_are():
    nemo = nemo_state() | {"a.count": torch.tensor(7), "a.scalar": torch.tensor(1.5, dtype=BF16)}
    found = dict(WeightStream(nemo, ADAPTER, dtype=FP32))
    assert (found["a.count"].dtype, int(found["a.count"])) == (torch.int64, 7)
    assert (found["a.scalar"].dtype, float(found["a.scalar"]), found["a.scalar"].shape) == (FP32, 1.5, ())


def test_a_state_that_is_no_native_model_or_half_of_one_is_refused():
    nemo = nemo_state()
    half = {name: tensor for name, tensor in nemo.items() if not name.endswith("layers.1.moe.experts.down_projs")}
    for state, error, words in (
        (half, IncompleteExpertsError, "layer 1: down missing"),
        ({"a": torch.ones(2)}, InputError, "without mixture-of-experts layers"),
        (nemo | random_hf_state_dict(), InputError, "in both layouts"),
        ({name: tensor.double() for name, tensor in nemo.items()}, InputError, "a dtype that is not converted"),
        (iter([nemo]), UsageError, "can't be read, or only once"),
        (ADAPTER, UsageError, "give the model first"),
    ):
        with pytest.raises(error, match=words):
            WeightStream(state, ADAPTER)


def test_a_state_that_changed_is_refused():
    nemo = nemo_state()
    stream = WeightStream(nemo, ADAPTER)
    name = "model.language_model.layers.2.input_layernorm.weight"
    kept = nemo.pop(name)
    with pytest.raises(InputError, match=f"(?s)changed since the stream.*{name}.*absent"):
        list(stream)
    nemo[name] = kept.float()
    with pytest.raises(InputError, match=r"(?s)bfloat16.*float32"):
        list(stream)
    parts = [nemo_state()]
    stream = WeightStream(parts, ADAPTER)
    parts.append({"b": torch.ones(2)})
    with pytest.raises(InputError, match=r"(?s)changed.*1 mappings.*2"):
        list(stream)
    parts.clear()
    with pytest.raises(InputError, match="absent"):
        list(stream)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"experts": "both"}, "no such value of experts"),
        ({"oversize": "split"}, "no such value of oversize"),
        ({"bucket_bytes": 0}, "bucket without room"),
        ({"dtype": "int8"}, "no dtype to convert to"),
        ({"exclude_key_regex": "("}, "not a regular expression"),
        ({"dst": 1}, "no such rank"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        WeightStream(nemo_state(), ADAPTER, **arguments)
