"""NeMo AutoModel's Checkpointer in one process: loads that would round twice are refused, and LoRA goes by names."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel
from gemma4_moe.integrations.nemo_automodel import refuse_two_roundings
from support import peer
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory, respell_as_legacy

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DOWN, SCALE = "layers.1.experts.down_proj", "layers.1.router.per_expert_scale"
TIED = "lm_head.weight"

# NeMo's LoRA modules need kernels for a GPU; its export goes by names, and so parameters of those names stand for them.
E, H, I, R = 6, 64, 24, 3  # noqa: E741
OPTIONS = {"dim": R, "alpha": 2 * R, "use_dora": False}
LORA = SimpleNamespace(**OPTIONS, to_dict=lambda: OPTIONS)
LAYERS = "model.language_model.layers."


def destinations(dtype):
    native = nemo_from_hf(random_hf_state_dict(prefix=""), dtype)
    return Gemma4MoEStateDictAdapter(None, None, None).to_hf(native, for_checkpoint_load=True)


@pytest.mark.parametrize("model", [BF16, FP16, FP32])
@pytest.mark.parametrize("file", [BF16, FP16, FP32])
def test_down_proj_is_refused_where_a_cast_loses_a_value(file, model):
    holds_all = torch.finfo(model).eps <= torch.finfo(file).eps and torch.finfo(model).max >= torch.finfo(file).max
    loaded = destinations(model)
    files = dict.fromkeys(loaded, file) | {SCALE: FP32}
    if holds_all:
        refuse_two_roundings(loaded, files, "DIR")
        return
    with pytest.raises(UsageError, match="round twice") as refused:
        refuse_two_roundings(loaded, files, "DIR")
    message = str(refused.value)
    assert all(part in message for part in (str(file)[6:], str(model)[6:], "down_proj", "DIR", "load_hf"))


def test_a_scale_in_double_precision_is_refused_and_neither_gate_up_nor_a_tensor_that_lacks_ever_is():
    loaded = destinations(BF16)
    refuse_two_roundings(loaded, dict.fromkeys(set(loaded) - {DOWN}, BF16), "DIR")
    loaded = destinations(FP32)
    gate_up = {name: torch.float64 for name in loaded if name.endswith("gate_up_proj")}
    refuse_two_roundings(loaded, dict.fromkeys(loaded, FP32) | gate_up, "DIR")
    with pytest.raises(UsageError, match="float64") as refused:
        refuse_two_roundings(loaded, dict.fromkeys(loaded, FP32) | {SCALE: torch.float64}, "DIR")
    assert refused.value.facts["tensor"] == SCALE


def load_base(model, base):
    peer.checkpointer(base, model_repo_id=str(base)).load_base_model(model, torch.device("cpu"), str(base), str(base))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != TIED}


@pytest.fixture
def base(tmp_path):
    save_model(build_model("multimodal", seed=3), tmp_path / "base")
    return tmp_path / "base"


def test_the_checkpointer_refuses_before_it_reads_and_no_longer_than_it_is_installed(base):
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config).to(BF16)
        before = weights(model)
        with pytest.raises(UsageError, match="the checkpoint has float32, its destination bfloat16"):
            load_base(model, base)
    assert_same_tensors(weights(model), before)
    load_base(model, base)
    correct = nemo_from_hf(read_directory(base), BF16)
    found = weights(model)
    wrong = [name for name in correct if not torch.equal(found[name], correct[name].to(BF16))]
    assert wrong
    assert all(name.endswith("moe.experts.down_projs") for name in wrong)


@pytest.mark.parametrize("form", ["safetensors", "torch_save"])
def test_training_checkpoints_are_loaded_and_their_dtypes_looked_at_too(form, base, tmp_path):
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config)
        load_base(model, base)
        before = weights(model)
        options = {"model_repo_id": str(base), "model_save_format": form, "save_consolidated": False}
        engine = peer.checkpointer(tmp_path, **options)
        engine.save_model(model, str(tmp_path))
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        engine.load_model(model, str(tmp_path / "model"))
        assert_same_tensors(weights(model), before)
        with pytest.raises(UsageError, match="round twice"):
            engine.load_model(model.to(BF16), str(tmp_path / "model"))


@pytest.fixture
def model():
    with nemo_automodel.installed():
        built = peer.model(build_model("multimodal").config)
    return built.requires_grad_(False)


def layers_of(model):
    return [module for name, module in model.named_modules() if name.startswith(LAYERS) and name.count(".") == 3]


def add_lora_to_experts(model):
    for layer in layers_of(model):
        layer.moe.experts.lora_down_A = torch.nn.Parameter(torch.randn(E, I, R))
        layer.moe.experts.lora_down_B = torch.nn.Parameter(torch.randn(E, R, H))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_lora_of_attention_is_saved_under_its_own_names_and_loaded_again(model, tmp_path):
    for layer in layers_of(model):
        projection = layer.self_attn.q_proj
        projection.lora_A = torch.nn.Linear(H, R, bias=False)
        projection.lora_B = torch.nn.Linear(R, projection.out_features, bias=False)
    before = trained(model)
    assert len(before) == 4
    engine = peer.checkpointer(tmp_path, is_peft=True)
    engine.save_model(model, str(tmp_path), peft_config=LORA)

    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in before} == saved.keys()
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"{LAYERS}{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert "target_parameters" not in config

    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.fill_(float("nan"))
    engine.load_model(model, str(tmp_path / "model"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


def test_lora_of_experts_is_saved_in_its_native_form_and_loaded_again(model, tmp_path):
    """`get_hf_state_dict_keys` is NeMo's first call, before it shards and loads the model."""
    add_lora_to_experts(model)
    before, state = trained(model), model.state_dict()
    assert {f"{LAYERS}{n}.moe.experts.lora_down_{side}" for n in (0, 1) for side in "AB"} == before.keys()
    for call in (model.state_dict_adapter.get_hf_state_dict_keys, load_destinations(model)):
        assert before.keys() <= set(call(state))
    engine = peer.checkpointer(tmp_path, is_peft=True)
    engine.save_model(model, str(tmp_path), peft_config=LORA)
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in before} == saved.keys()
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.fill_(float("nan"))
    engine.load_model(model, str(tmp_path / "model"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


def load_destinations(model):
    return lambda state: model.state_dict_adapter.to_hf(state, for_checkpoint_load=True)


def test_no_expert_parameter_is_promised_in_the_adapters_config(model):
    from nemo_automodel.components.checkpoint import addons

    add_lora_to_experts(model)
    assert addons._extract_target_parameters(model) == []


def test_a_checkpoint_of_the_legacy_spelling_is_loaded(base):
    expected = nemo_from_hf(read_directory(base))
    respell_as_legacy(base)
    assert any(".moe.down_proj" in name for name in read_directory(base))
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config)
        load_base(model, base)
    assert_same_tensors(weights(model), expected)


def test_a_config_that_names_a_quantisation_loads_weights_that_are_not_quantised(base):
    with nemo_automodel.installed():
        model = peer.model(build_model("multimodal").config)
        model.config.quantization_config = {"quant_method": "fp8"}
        load_base(model, base)
    experts = nemo_from_hf(read_directory(base), model.state_dict_adapter.dtype)  # NeMo copies them into the model
    assert_same_tensors(weights(model), {name: tensor.float() for name, tensor in experts.items()})
    state = model.state_dict()
    asked = model.state_dict_adapter.to_hf(state, quantization=True, for_checkpoint_load=True)
    assert asked.keys() == model.state_dict_adapter.to_hf(state).keys()
