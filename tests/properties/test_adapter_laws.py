"""The laws of the adapter for any sizes, dtypes, values, prefixes and layer numbers; each is about one drawn model."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4_moe import Gemma4MoEStateDictAdapter
from support.formulas import assert_same_tensors, hf_from_nemo, legacy_name, nemo_from_hf

State = dict[str, torch.Tensor]

_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
#: Values at the ends of the ranges, sprinkled among ordinary ones.
_EDGES = (0.0, -0.0, 1e-45, -6e-8, 1.2e-38, 65504.0, 3e38, -3e38, float("inf"), 1.0)


@dataclass(frozen=True)
class Model:
    """A model to draw: sizes that are all different, dtypes of file, scale and target, names, and a seed of values."""

    E: int
    H: int
    I: int  # noqa: E741
    file: torch.dtype
    scale: torch.dtype
    target: torch.dtype
    prefix: str
    layers: tuple[int, ...]
    seed: int

    def hf(self, prefix=None):
        """The hf state dict; weights are ordinary or at the ends of the range, no scale is one, zero or infinite."""
        generator = torch.Generator().manual_seed(self.seed)
        prefix = self.prefix if prefix is None else prefix

        def weights(*shape):
            drawn = torch.randn(shape, generator=generator)
            edges = torch.tensor(_EDGES)[torch.randint(len(_EDGES), shape, generator=generator)]
            return torch.where(torch.rand(shape, generator=generator) < 0.2, edges, drawn).to(self.file)

        def scales(*shape):
            drawn = torch.empty(shape).uniform_(1.05, 1.95, generator=generator)
            signs = torch.where(torch.rand(shape, generator=generator) < 0.2, -1.0, 1.0)
            return (drawn * signs * 2.0 ** torch.randint(-2, 2, shape, generator=generator)).to(self.scale)

        state = {f"{prefix}embed_tokens.weight": weights(3, self.H)}
        for layer in self.layers:
            path = f"{prefix}layers.{layer}."
            state |= {
                f"{path}router.per_expert_scale": scales(self.E),
                f"{path}experts.gate_up_proj": weights(self.E, 2 * self.I, self.H),
                f"{path}router.scale": weights(self.H),
                f"{path}experts.down_proj": weights(self.E, self.H, self.I),
                f"{path}router.proj.weight": weights(self.E, self.H),
            }
        return state

    def nemo(self):
        """A nemo state dict in the target dtype whose bits are random: any NaN, any subnormal."""
        generator = torch.Generator().manual_seed(self.seed)
        word = _WORDS[self.target]
        limits = torch.iinfo(word)
        shapes = {name: tensor.shape for name, tensor in nemo_from_hf(self.hf()).items()}
        return {
            name: torch.randint(limits.min, limits.max, shape, generator=generator, dtype=word).view(self.target)
            for name, shape in shapes.items()
        }

    def adapter(self):
        return Gemma4MoEStateDictAdapter(None, None, None, dtype=self.target)


def nemo_to_hf_to_nemo_is_bit_exact(model):
    nemo = model.nemo()
    assert_same_tensors(model.adapter().from_hf(model.adapter().to_hf(nemo)), nemo)


def hf_to_nemo_is_the_formula(model):
    hf = model.hf()
    found = model.adapter().from_hf(hf)
    assert_same_tensors(found, nemo_from_hf(hf, model.target))
    assert all(tensor.is_contiguous() for tensor in found.values())


def nemo_to_hf_is_the_formula(model):
    nemo = model.nemo()
    found = Gemma4MoEStateDictAdapter(None, None, None, dtype=model.file).to_hf(nemo)  # the tensors' dtype counts
    assert_same_tensors(found, hf_from_nemo(nemo))
    assert all(tensor.is_contiguous() for tensor in found.values())


def every_name_keeps_its_prefix(model):
    under, bare = (model.adapter().from_hf(model.hf(prefix)) for prefix in (model.prefix, ""))
    assert_same_tensors(under, {model.prefix + name: tensor for name, tensor in bare.items()})
    back, back_bare = model.adapter().to_hf(under), model.adapter().to_hf(bare)
    assert_same_tensors(back, {model.prefix + name: tensor for name, tensor in back_bare.items()})


def the_order_of_entries_is_free(model):
    hf = model.hf()
    expected = model.adapter().from_hf(hf)
    names = list(hf)
    random.Random(model.seed).shuffle(names)
    assert_same_tensors(model.adapter().from_hf((name, hf[name]) for name in names), expected)
    assert_same_tensors(model.adapter().from_hf({name: hf[name] for name in names}), expected)


def the_legacy_spelling_means_the_same(model):
    hf = model.hf()
    legacy = {legacy_name(name): tensor for name, tensor in hf.items()}
    assert len(legacy.keys() - hf.keys()) == 3 * len(model.layers)
    half = {legacy_name(name) if name.endswith("down_proj") else name: tensor for name, tensor in hf.items()}
    for state in (legacy, half):
        assert_same_tensors(model.adapter().from_hf(state), model.adapter().from_hf(hf))


def slicing_experts_and_converting_commute(model):
    first = model.seed % model.E
    chosen = slice(first, first + 1 + model.seed // model.E % (model.E - first))

    def sliced(state):
        return {name: tensor[chosen] if _has_experts(name) else tensor for name, tensor in state.items()}

    hf, nemo = model.hf(), model.nemo()
    assert_same_tensors(model.adapter().from_hf(sliced(hf)), sliced(model.adapter().from_hf(hf)))
    assert_same_tensors(model.adapter().to_hf(sliced(nemo)), sliced(model.adapter().to_hf(nemo)))


def tensor_by_tensor_is_the_whole(model):
    nemo = model.nemo()
    whole = model.adapter().to_hf(nemo)
    single = model.adapter().convert_single_tensor_to_hf
    pairs = [pair for name, tensor in nemo.items() for pair in single(name, tensor)]
    assert [name for name, _ in pairs] == list(whole) == model.adapter().get_hf_state_dict_keys(nemo)
    assert_same_tensors(dict(pairs), whole)


def loading_in_place_is_loading_in_memory(model):
    if model.target not in (model.file, torch.float32):
        return  # the reader rounds before the scale multiplies: not exact, and not promised
    hf = model.hf()
    expected = nemo_from_hf(hf, model.target)
    live = {name: torch.full_like(tensor, -3) for name, tensor in expected.items()}
    views = model.adapter().to_hf(live, for_checkpoint_load=True)
    for name, tensor in hf.items():
        views[name].copy_(tensor)
    for _ in range(2):
        assert_same_tensors(model.adapter().from_hf(views), expected)
        assert_same_tensors(live, expected)
        assert all(bool((view == 1).all()) for name, view in views.items() if name.endswith("per_expert_scale"))


LAWS = (
    nemo_to_hf_to_nemo_is_bit_exact,
    hf_to_nemo_is_the_formula,
    nemo_to_hf_is_the_formula,
    every_name_keeps_its_prefix,
    the_order_of_entries_is_free,
    the_legacy_spelling_means_the_same,
    slicing_experts_and_converting_commute,
    tensor_by_tensor_is_the_whole,
    loading_in_place_is_loading_in_memory,
)


def _has_experts(name):
    return not name.endswith(("embed_tokens.weight", "router.scale", "moe.gate.scale"))


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
PREFIXES = st.one_of(
    st.sampled_from(
        ["model.language_model.", "model.", "language_model.", "", "base_model.model.model.", "model.encoder."]
    ),
    st.text(min_size=1, max_size=20).filter(lambda text: "layers." not in text).map(lambda text: text + "."),
)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7)).filter(
    lambda sizes: len({*sizes, 2 * sizes[2]}) == 4
)
LAYERS = st.lists(st.integers(0, 999_999_999), min_size=1, max_size=3, unique=True)


MODELS = st.builds(
    lambda sizes, **rest: Model(*sizes, **rest),
    SIZES,
    file=DTYPES,
    scale=DTYPES,
    target=DTYPES,
    prefix=PREFIXES,
    layers=LAYERS.map(tuple),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=MODELS)
def test_law(law, model):
    law(model)
