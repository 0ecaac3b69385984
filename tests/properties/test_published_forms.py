"""Every published form is read at every entrance, and gives the bits that the fused form gives."""

import pytest
import torch
from safetensors import safe_open

from distributed import io_checks
from gemma4_moe import Gemma4MoEStateDictAdapter, convert, inspect, load_hf, plan, verify
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.errors import DuplicateTensorError, IncompleteExpertsError, TensorShapeError, UnknownTensorError
from gemma4_moe.layout.dtypes import BFLOAT16
from support import published, ranks
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory
from support.published import FORMS
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

E, H, I = 6, 10, 7  # noqa: E741
HF = random_hf_state_dict() | {"model.vision_tower.std_bias": torch.arange(3.0)}
LAYER = "model.language_model.layers.1."


@pytest.fixture(params=FORMS, ids=" ".join)
def form(request):
    return request.param


def written(directory, form, hf=HF):
    return write_checkpoint(directory, FORMS[form](hf), config_of(hf), files=3)


def adapter(dtype=torch.bfloat16):
    return Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None, dtype)


def test_it_is_converted_to_the_bits_of_the_fused_form_and_verified(form, tmp_path):
    source = written(tmp_path / "form", form)
    write_checkpoint(tmp_path / "fused", HF)
    done = convert(source, tmp_path / "nemo", workers=1)
    convert(tmp_path / "fused", tmp_path / "expected", workers=1)
    weights = "nemo.safetensors"
    assert contents(tmp_path / "nemo")[weights] == contents(tmp_path / "expected")[weights]
    assert done.plan.spelling == form[0]
    found = verify(source, tmp_path / "nemo")
    assert (found.different, found.tensors) == ((), len(nemo_from_hf(HF)))
    again = verify(tmp_path / "nemo", source)  # the scale differs, so that each expert is folded again
    assert again.different == ()


def test_verify_sees_one_wrong_element_of_one_part(form, tmp_path):
    source = written(tmp_path / "form", form)
    changed = dict(HF)
    name = f"{LAYER}experts.gate_up_proj"
    changed[name] = HF[name].clone()
    changed[name][4, I + 2, 3] += 1
    convert(write_checkpoint(tmp_path / "fused", changed), tmp_path / "nemo")
    (difference,) = verify(source, tmp_path / "nemo").different
    assert (difference.count, difference.index) == (1, (4, 3, I + 2))


def test_inspect_and_plan_name_it_and_find_nothing_wrong(form, tmp_path):
    source = written(tmp_path / "form", form)
    found = inspect(source, values=True)
    assert (found.layout, found.spelling, found.problems) == ("hf", form[0], ())
    assert any("MLX's prefixes" in note for note in found.notes) == (form[0] == "MLX")
    assert plan(source).plan.spelling == form[0]


def test_load_hf_fills_a_model(form, tmp_path):
    expected = nemo_from_hf(HF, torch.float32)
    model = {name: torch.full_like(tensor, 3) for name, tensor in expected.items()}
    load_hf(model, written(tmp_path / "form", form))
    assert_same_tensors(model, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_hf_takes_it_and_keeps_its_prefix(form, dtype):
    expected = nemo_from_hf(HF, dtype)
    if form[0] == "MLX":
        expected = {published.mlx_name(name): tensor for name, tensor in expected.items()}
    assert_same_tensors(adapter(dtype).from_hf(FORMS[form](HF)), expected)


def test_from_hf_reads_lazy_slices(tmp_path):
    directory = written(tmp_path / "form", ("per-expert", "moe weight"))
    files = [safe_open(file, "pt") for file in sorted(directory.glob("*.safetensors"))]
    lazy = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
    lazy["model.vision_tower.std_bias"] = torch.arange(3.0)
    assert_same_tensors(adapter().from_hf(lazy), nemo_from_hf(HF))


def test_two_ranks_take_their_own_part(form, tmp_path):
    if form[0] == "MLX":
        pytest.skip("the adapter keeps MLX's prefix: io_checks names the model's")
    hf = random_hf_state_dict(E=io_checks.E, H=io_checks.H, I=io_checks.I, layers=2)
    ranks.run(2, io_checks.check_form, 2, written(tmp_path / "form", form, hf), form)


def test_a_base_gives_its_own_bits_back(form, tmp_path):
    base = written(tmp_path / "form", form)
    convert(base, tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "back", base=base)
    assert_same_tensors(read_directory(tmp_path / "back"), HF)


def test_scales_can_be_given_to_each_form(form, tmp_path):
    ones = {name: torch.ones_like(tensor) if "per_expert_scale" in name else tensor for name, tensor in HF.items()}
    state = FORMS[form](HF)
    lost = {name: tensor for name, tensor in state.items() if "per_expert_scale" not in name}
    source = write_checkpoint(tmp_path / "lost", lost, config_of(HF))
    convert(source, tmp_path / "nemo", scale="ones")
    assert_same_tensors(read_directory(tmp_path / "nemo"), nemo_from_hf(ones))
    write_checkpoint(tmp_path / "origin", state, config_of(HF))
    convert(source, tmp_path / "folded", scale_from=tmp_path / "origin")
    assert_same_tensors(read_directory(tmp_path / "folded"), nemo_from_hf(HF))


def refused(state, error, words, tmp_path):
    """Every entrance refuses it, and nothing is written; the errors are returned."""
    source = write_checkpoint(tmp_path / "bad", state, config_of(HF))
    before = contents(tmp_path)
    attempts = [
        lambda: convert(source, tmp_path / "nemo"),
        lambda: plan(source),
        lambda: adapter().from_hf(state),
    ]
    found = []
    for attempt in attempts:
        with pytest.raises(error, match=words) as caught:
            attempt()
        assert caught.value.hint
        found.append(caught.value)
    assert contents(tmp_path) == before
    return found


SINGLE = ("per-expert", "weight")


def diffusion():
    """A state dict of DiffusionGemma's names, its config, and the native one that NeMo's model of it has."""
    hf = {f"model.decoder.{name}": tensor for name, tensor in random_hf_state_dict(prefix="").items()}
    hf["model.encoder.language_model.layers.0.layer_scalar"] = torch.tensor([0.75])
    native = {name.replace("model.decoder.", "model."): tensor for name, tensor in nemo_from_hf(hf).items()}
    config = config_of(hf)
    config["model_type"], config["text_config"]["model_type"] = "diffusion_gemma", "diffusion_gemma_text"
    return hf, config, native


def test_the_decoder_of_diffusion_gemma_changes_its_prefix_and_says_so(tmp_path):
    hf, config, native = diffusion()
    source = write_checkpoint(tmp_path / "hf", hf, config)
    done = convert(source, tmp_path / "nemo")
    assert_same_tensors(read_directory(tmp_path / "nemo"), native)
    assert any("model.decoder. in the hf layout and model. in the nemo layout" in note for note in done.notes)
    assert verify(source, tmp_path / "nemo").different == ()
    found = inspect(source)
    assert (found.layout, found.spelling, found.problems) == ("hf", "current", ())
    assert_same_tensors(adapter().from_hf(hf), native)
    model = {name: torch.zeros_like(tensor) for name, tensor in native.items() if "encoder" not in name}
    assert load_hf(model, source).unexpected_keys == ("model.encoder.language_model.layers.0.layer_scalar",)
    assert_same_tensors(model, {name: native[name] for name in model})
    convert(tmp_path / "nemo", tmp_path / "back", base=source)
    assert_same_tensors(read_directory(tmp_path / "back"), hf)
    assert verify(tmp_path / "nemo", tmp_path / "back").different == ()


def test_mlx_without_a_vision_tower_is_converted_under_a_text_only_config(tmp_path):
    text = {name: tensor for name, tensor in HF.items() if "vision" not in name}
    config = config_of(HF)["text_config"]
    source = write_checkpoint(tmp_path / "mlx", FORMS["MLX", ""](text), config)
    with pytest.raises(UnknownTensorError, match="names of a multimodal model") as caught:
        convert(source, tmp_path / "nemo")
    assert "--strip-wrappers" in caught.value.hint
    convert(source, tmp_path / "nemo", strip_wrappers=True)
    expected = {name.replace("language_model.", ""): tensor for name, tensor in nemo_from_hf(text).items()}
    assert_same_tensors(read_directory(tmp_path / "nemo"), expected)


def test_two_names_that_become_one_without_their_prefix_are_refused(tmp_path):
    hf, config, _ = diffusion()
    hf["model.norm.weight"], hf["model.decoder.norm.weight"] = torch.ones(H), torch.zeros(H)
    source = write_checkpoint(tmp_path / "hf", hf, config)
    with pytest.raises(DuplicateTensorError, match="two names that become one"):
        convert(source, tmp_path / "nemo")
    with pytest.raises(DuplicateTensorError):
        adapter().from_hf(hf)


@pytest.mark.parametrize(
    "missing", ["experts.3.up_proj.weight", "experts.0.gate_proj.weight", "experts.5.down_proj.weight"]
)
def test_an_expert_that_is_missing_is_named(missing, tmp_path):
    state = FORMS[SINGLE](HF)
    del state[LAYER + missing]
    errors = refused(state, IncompleteExpertsError, "for layer 1: part of", tmp_path)
    assert {error.facts["tensor"] for error in errors} == {LAYER + missing}


def test_an_expert_beyond_the_last_is_named(tmp_path):
    name = f"{LAYER}experts.{E}.up_proj.weight"
    state = FORMS[SINGLE](HF) | {name: torch.zeros(I, H, dtype=torch.bfloat16)}
    errors = refused(state, TensorShapeError, "an expert that the model does not have", tmp_path)
    assert {error.facts["tensor"] for error in errors} == {name}


@pytest.mark.parametrize("form", [("unfused", "plain"), ("unfused", "weight"), ("MLX", ""), SINGLE], ids=" ".join)
def test_gate_without_up_is_refused(form, tmp_path):
    state = {
        name: tensor for name, tensor in FORMS[form](HF).items() if "layers.1." not in name or ".up_proj" not in name
    }
    (error, *_) = refused(state, IncompleteExpertsError, "for layer 1: part of gate_up missing", tmp_path)
    assert "up_proj" in error.facts["tensor"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("per-expert", "weight"), ("per-expert", "plain")),
        (("per-expert", "weight"), ("per-expert", "moe weight")),
        (("unfused", "plain"), ("per-expert", "weight")),
        (("unfused", "plain"), ("unfused", "weight")),
    ],
    ids=str,
)
def test_two_conventions_in_one_role_are_refused_even_if_each_expert_is_there_once(one, other, tmp_path):
    first, second = FORMS[one](HF), FORMS[other](HF)
    keep = [name for name in first if "layers.1." not in name or ".up_proj" not in name]
    state = {name: first[name] for name in keep}
    state |= {name: tensor for name, tensor in second.items() if "layers.1." in name and ".up_proj" in name}
    refused(state, DuplicateTensorError, "two spellings", tmp_path)


def test_a_fused_tensor_beside_single_experts_is_refused(tmp_path):
    state = FORMS[SINGLE](HF) | {f"{LAYER}experts.down_proj": torch.ones(E, H, I, dtype=torch.bfloat16)}
    refused(state, DuplicateTensorError, "two spellings", tmp_path)


def test_one_expert_of_another_shape_or_dtype_is_named(tmp_path):
    name = f"{LAYER}experts.2.gate_proj.weight"
    for number, (changed, words) in enumerate(
        [(torch.zeros(H, I, dtype=torch.bfloat16), "wrong shape"), (torch.zeros(I, H), "different dtypes")]
    ):
        (tmp_path / str(number)).mkdir()
        errors = refused(FORMS[SINGLE](HF) | {name: changed}, TensorShapeError, words, tmp_path / str(number))
        assert name in str(errors[0])


def real_headers(form):
    """Names and shapes of the 26B model's tensors in a form."""

    class Shape:
        """A shape that is cut as its tensor would be."""

        def __init__(self, *sizes):
            self.shape = sizes

        def __len__(self):
            return self.shape[0]

        def __getitem__(self, index):
            if isinstance(index, int):
                return Shape(*self.shape[1:])
            *leading, last = index if isinstance(index, tuple) else (index,)
            size = len(range(*last.indices(self.shape[len(leading)])))
            return Shape(*self.shape[: len(leading)], size, *self.shape[len(leading) + 1 :])

        def contiguous(self):
            return self

    found = FORMS[form]({name: Shape(*shape) for name, shape in real_names_and_shapes().items()})
    return {name: list(shape.shape) for name, shape in found.items()}


@pytest.mark.parametrize("form", [("per-expert", "moe weight"), ("unfused", "plain"), ("MLX", "")], ids=" ".join)
def test_the_real_model_is_planned_from_its_headers(form, tmp_path):
    headers = real_headers(form)
    write_sparse_checkpoint(tmp_path / "real", headers, BFLOAT16, real_config())
    assert len(headers) == (1013 + 30 * (128 * 3 - 2) if form[0] == "per-expert" else 1013 + 30)
    found = plan(tmp_path / "real")
    assert (found.plan.spelling, len(found.plan.tensors)) == (form[0], 1013 - 30)
