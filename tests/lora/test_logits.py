"""An adapter trained by NeMo's own modules gives the same logits in every form: in NeMo, by PEFT, merged, and back."""

import copy
import importlib
import warnings

import pytest
import torch
from safetensors.torch import load_file

from gemma4_moe import Gemma4MoEStateDictAdapter, convert_lora, merge
from gemma4_moe.demo.small_models import WORDS, build_model, logits, save_model
from support import peer
from support.adapters import PREFIX, native_config, write_adapter

R, ALPHA = 3, 7
LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base on disk, NeMo's model of it with LoRA trained on experts and attention, its logits, and its directory."""
    root = tmp_path_factory.mktemp("lora")
    source = build_model("multimodal", seed=4)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, tensor in source.state_dict().items():
            if name.endswith("per_expert_scale"):
                tensor.uniform_(0.3, 3.0, generator=generator)
    save_model(source, root / "base")
    model = with_lora(source, generator)
    train(model)
    state = {PREFIX + name: p.detach().clone() for name, p in lora_of(model)}
    write_adapter(root / "native", state, native_config(R, ALPHA), {"dropout": 0.5})
    convert_lora(root / "native", root / "peft", to="peft", base=root / "base")
    convert_lora(root / "native", root / "vllm", to="vllm", base=root / "base")
    return source, logits(model), root


def with_lora(source, generator=None):
    """NeMo's model of a transformers model: its own LoRA on experts, and the same rule in a hook on attention.

    NeMo's linear LoRA needs a GPU. A is random if there is a generator, and B is zero.
    """
    model = peer.model(source.config).requires_grad_(False)
    adapter = Gemma4MoEStateDictAdapter(source.config.text_config, None, None, dtype=torch.float32)
    model.load_state_dict(adapter.from_hf(source.state_dict()), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = importlib.import_module("nemo_automodel.components._peft.lora_experts")
    for name, module in list(model.named_modules()):
        if name.endswith("moe.experts"):
            new = lora.GroupedExpertsLoRA(module, lora_dim=R, alpha=ALPHA)
            model.get_submodule(name.rpartition(".")[0]).experts = new
        elif name.endswith("self_attn.q_proj") and LAYERS in name:
            module.lora_A = torch.nn.Linear(module.in_features, R, bias=False)
            module.lora_B = torch.nn.Linear(R, module.out_features, bias=False)
            module.register_forward_hook(add_change)
    for name, parameter in lora_of(model):
        if "_B" in name or generator is None:
            parameter.data.zero_()
        else:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def add_change(module, inputs, output):
    return output + ALPHA / R * module.lora_B(module.lora_A(*inputs))


def lora_of(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]


def train(model, steps=6):
    """Take a few steps on random texts; every expert gets a gradient."""
    parameters = [parameter.requires_grad_() for _, parameter in lora_of(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(3, WORDS, (4, 25), generator=generator)
        with torch.compiler.set_stance("force_eager"):  # NeMo's activation is compiled: its compilation warns
            found = model(input_ids=tokens[:, :-1]).logits
            torch.nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.any() for parameter in parameters)


def close_to(found, expected):
    return (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def merged_by_the_rule_of_vllm(source, adapter):
    """A copy of a model, each expert's matrices multiplied and added with the one scaling of the config."""
    model = copy.deepcopy(source)
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    I = source.config.text_config.moe_intermediate_size  # noqa: E741
    with torch.no_grad():
        for name, a in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            change = ALPHA / R * (tensors[name.replace("lora_A", "lora_B")] @ a)
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            path, _, rest = module.partition(".experts.")
            if not rest:
                weights[f"{module}.weight"] += change
                continue
            expert, projection = rest.split(".")
            if projection == "down_proj":
                weights[f"{path}.experts.down_proj"][int(expert)] += change
            else:
                rows = slice(I, None) if projection == "up_proj" else slice(I)
                weights[f"{path}.experts.gate_up_proj"][int(expert), rows] += change
    return model


def test_the_names_are_those_of_nemos_own_modules(trained):
    names = set(load_file(trained[2] / "native" / "adapter_model.safetensors"))
    assert {name.rpartition(".")[2] for name in names if "experts" in name} == {
        "lora_gate_and_up_A",
        "lora_gate_and_up_B",
        "lora_down_A",
        "lora_down_B",
    }


def test_by_the_rule_of_vllm_the_logits_are_those_of_nemo(trained):
    source, expected, root = trained
    assert not close_to(logits(source), expected)
    assert close_to(logits(merged_by_the_rule_of_vllm(source, root / "vllm")), expected)


def test_without_the_division_they_differ_by_more_than_a_hundredth(trained, tmp_path):
    source, expected, root = trained
    ones = {f"{LAYERS}{n}.router.per_expert_scale": torch.ones(6) for n in (0, 1)}
    convert_lora(root / "native", tmp_path / "undivided", to="vllm", base=ones)
    found = logits(merged_by_the_rule_of_vllm(source, tmp_path / "undivided"))
    assert (found - expected).abs().max() > 1e-2


def load_by_peft(source, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import peft

        return peft.PeftModel.from_pretrained(copy.deepcopy(source), directory)


def test_loaded_by_peft_they_are_those_of_nemo_merged_or_not(trained):
    source, expected, root = trained
    model = load_by_peft(source, root / "peft")
    assert close_to(logits(model), expected)
    assert close_to(logits(model.merge_and_unload()), expected)


# PEFT 0.21 compares patterns with modules alone, and applies them to parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_what_peft_has_made_is_read_with_its_patterns(trained, tmp_path):
    import peft

    source = trained[0]
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}}
    config = peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=[f"{LAYERS}0.self_attn.q_proj"], target_parameters=parameters, **options
    )
    model = peft.get_peft_model(copy.deepcopy(source), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    expected = dict(model.merge_and_unload().named_parameters())
    convert_lora(tmp_path / "peft", tmp_path / "old", to="peft", legacy_layout=True)
    convert_lora(tmp_path / "old", tmp_path / "vllm", to="vllm")
    found = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    own = dict(source.named_parameters())
    for layer in (0, 1):
        for e in range(6):
            pair = [found[f"{PREFIX}{LAYERS}{layer}.experts.{e}.down_proj.lora_{s}.weight"] for s in "BA"]
            weight = f"{LAYERS}{layer}.experts.down_proj"
            assert torch.allclose(expected[weight][e] - own[weight][e], pair[0] @ pair[1] * 9 / 4, atol=1e-6)
            pair = [found[f"{PREFIX}{LAYERS}{layer}.experts.{e}.gate_proj.lora_{s}.weight"] for s in "BA"]
            weight = f"{LAYERS}{layer}.experts.gate_up_proj"
            assert torch.allclose(expected[weight][e][:24] - own[weight][e][:24], pair[0] @ pair[1] * 9 / 4, atol=1e-6)


def weights(directory):
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def merged_by_transformers(source, directory):
    """The logits of a merged directory, in which transformers must find every name and leave none over."""
    loaded, names = type(source).from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(names[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return logits(loaded.eval())


@pytest.mark.parametrize("form", ["native", "peft", "vllm"])
def test_merged_and_loaded_by_transformers_they_are_those_of_nemo(form, trained, tmp_path):
    source, expected, root = trained
    merge(root / "base", root / form, tmp_path / "merged")
    assert close_to(merged_by_transformers(source, tmp_path / "merged"), expected)


@pytest.mark.parametrize("form", ["native", "peft", "vllm"])
def test_merged_into_the_nemo_layout_they_are_those_of_nemo(form, trained, tmp_path):
    source, expected, root = trained
    merge(root / "base", root / form, tmp_path / "merged", to="nemo")
    model = peer.model(source.config)
    model.load_state_dict(weights(tmp_path / "merged") | tied(model), strict=True)
    assert close_to(logits(model), expected)


def tied(model):
    return {name: model.state_dict()[name] for name in ("lm_head.weight",) if name in model.state_dict()}


def test_the_way_back_from_peft_gives_nemo_the_same_logits(trained, tmp_path):
    source, expected, root = trained
    convert_lora(root / "peft", tmp_path / "back", to="nemo", base=root / "base")
    model = with_lora(source)
    assert not close_to(logits(model), expected)
    found = weights(tmp_path / "back")
    for name, parameter in lora_of(model):
        parameter.data.copy_(found[PREFIX + name])
    assert close_to(logits(model), expected)


@pytest.mark.parametrize("form", ["native", "peft", "vllm"])
def test_a_merge_is_pefts_own_within_the_rounding_of_fp32(form, trained, tmp_path):
    source, _, root = trained
    expected = load_by_peft(source, root / "peft").merge_and_unload().state_dict()
    merge(root / "base", root / form, tmp_path / "merged")
    found = weights(tmp_path / "merged")
    changed = 0
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 2e-6 * max(1, expected[name].abs().max()), name
        changed += not torch.equal(tensor, source.state_dict()[name])
    assert changed == 6


def test_without_the_division_a_merge_differs_by_more_than_a_hundredth(trained, tmp_path):
    source, _, root = trained
    expected = load_by_peft(source, root / "peft").merge_and_unload().state_dict()
    ones = {f"{LAYERS}{n}.router.per_expert_scale": torch.ones(6) for n in (0, 1)}
    convert_lora(root / "native", tmp_path / "undivided", to="peft", base=ones)
    merge(root / "base", tmp_path / "undivided", tmp_path / "merged")
    found = weights(tmp_path / "merged")
    for layer in (0, 1):
        name = f"{LAYERS}{layer}.experts.down_proj"
        assert (found[name] - expected[name]).abs().max() > 1e-2


# PEFT 0.21 compares patterns with modules alone, and applies them to parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_experts_of_another_rank_are_loaded_by_peft_with_the_pattern_that_is_written(trained, tmp_path):
    source, _, root = trained
    state, generator = weights(root / "native"), torch.Generator().manual_seed(2)
    for name, tensor in state.items():  # linear modules get twice the rank of experts
        if "self_attn" in name:
            shape = [2 * R if size == R else size for size in tensor.shape]
            state[name] = torch.randn(shape, generator=generator) / 10
    write_adapter(tmp_path / "native", state, native_config(2 * R, ALPHA), {"moe_rank_scaling": True})
    convert_lora(tmp_path / "native", tmp_path / "peft", to="peft", base=root / "base")
    expected = load_by_peft(source, tmp_path / "peft").merge_and_unload().state_dict()
    merge(root / "base", tmp_path / "native", tmp_path / "merged")
    for name, tensor in weights(tmp_path / "merged").items():
        assert (tensor - expected[name]).abs().max() <= 2e-6 * max(1, expected[name].abs().max()), name
