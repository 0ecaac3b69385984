"""NeMo AutoModel's LoRA on experts and every linear module, router included: saved and resumed, ours and theirs."""

import importlib
import json
from contextlib import nullcontext
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from gemma4_moe import convert_lora
from gemma4_moe.demo.small_models import build_model, save_model
from gemma4_moe.integrations import nemo_automodel
from support import peer, ranks

#: The linear modules that NeMo's recipe for this model leaves out; it trains all others.
EXCLUDED = ["*vision_tower*", "*embed_vision*", "*lm_head*"]
GATE = "moe.gate.proj.lora_"
R = 3
OPTIONS = {"dim": R, "alpha": 2 * R, "use_dora": False}
LORA = SimpleNamespace(**OPTIONS, to_dict=lambda: OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def nemo_is_imported_once():
    modules = ("checkpoint.checkpointing", "distributed.mesh", "models.gemma4_moe.model", "moe.parallelizer")
    with ranks.preloading(*(f"nemo_automodel.components.{module}" for module in modules)):
        yield


@pytest.mark.parametrize(("writer", "reader"), [("ours", "ours"), ("theirs", "ours"), ("ours", "theirs")])
@pytest.mark.parametrize("world", [1, 2])
def test_what_one_adapter_saves_the_other_resumes(world, writer, reader, tmp_path):
    save_model(build_model("multimodal", seed=5), tmp_path / "base")
    ranks.run(world, check_resume, writer, reader, tmp_path / "base", tmp_path / "run")

    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    router = "router.proj" if writer == "ours" else "moe.gate.proj"
    layer = "model.language_model.layers.1."
    assert {name for name in saved if router in name} == {
        f"base_model.model.model.language_model.layers.{number}.{router}.lora_{part}.weight"
        for number in (0, 1)
        for part in "AB"
    }
    assert {f"{layer}{router}", f"{layer}self_attn.q_proj", f"{layer}mlp.down_proj"} <= set(config["target_modules"])
    assert "target_parameters" not in config


@pytest.mark.parametrize("world", [1, 2])
def test_save_resume_save_gives_the_same_bytes(world, tmp_path):
    save_model(build_model("multimodal", seed=5), tmp_path / "base")
    ranks.run(world, check_again, tmp_path / "base", tmp_path / "first", tmp_path / "second")
    first, second = (path / "model" for path in (tmp_path / "first", tmp_path / "second"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "automodel_peft_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    saved = load_file(first / "adapter_model.safetensors")
    own = {name for name in saved if ".moe.experts." in name}
    assert own == {
        f"base_model.model.model.language_model.layers.{layer}.moe.experts.lora_{stem}_{side}"
        for layer in (0, 1)
        for stem in ("gate_and_up", "down")
        for side in "AB"
    }
    assert saved[next(name for name in own if name.endswith("down_B"))].shape == (6, R + 1, 64)
    convert_lora(first, tmp_path / "peft", to="peft", base=tmp_path / "base")  # what it saves is read


def check_again(base, first, second):
    """Save, load into a model with other values, and save that."""
    model, checkpointer = with_lora("ours", base, first, seed=1)
    checkpointer.save_model(model, str(first), peft_config=LORA)
    dist.barrier()
    other, checkpointer = with_lora("ours", base, second, seed=2)
    checkpointer.load_model(other, str(first / "model"))
    expected = lora_of(model)
    for name, tensor in lora_of(other).items():
        assert torch.equal(tensor, expected[name]), name
    checkpointer.save_model(other, str(second), peft_config=LORA)
    dist.barrier()


def check_resume(writer, reader, base, target):
    """Save random LoRA weights with one adapter, and load them into another model with the other."""
    model, checkpointer = with_lora(writer, base, target, seed=1)
    checkpointer.save_model(model, str(target), peft_config=LORA)
    dist.barrier()
    expected = lora_of(model)
    assert sum(GATE in name for name in expected) == 4
    other, checkpointer = with_lora(reader, base, target, seed=2)
    before = lora_of(other)
    checkpointer.load_model(other, str(target / "model"))
    found = lora_of(other)
    # NeMo's own adapter does not look for the router's under its hf name.
    kept = {name for name in found if GATE in name} if (writer, reader) == ("ours", "theirs") else set()
    for name, tensor in expected.items():
        assert not torch.equal(before[name], tensor), name
        assert torch.equal(found[name], before[name] if name in kept else tensor), name


def with_lora(whose, base, target, seed):
    """NeMo's model with LoRA of random weights, sharded over all ranks, and its Checkpointer."""
    from transformers import AutoConfig

    with nemo_automodel.installed() if whose == "ours" else nullcontext():
        model = peer.model(AutoConfig.from_pretrained(base))
    add_lora(model)
    model._pre_shard_hf_state_dict_keys = model.state_dict_adapter.get_hf_state_dict_keys(model.state_dict())
    torch.manual_seed(seed)
    for _, parameter in sorted(trained(model)):
        torch.nn.init.normal_(parameter.data)
    world, moe_mesh = dist.get_world_size(), None
    if world > 1:
        config = importlib.import_module("nemo_automodel.components.distributed.config").FSDP2Config()
        meshes = importlib.import_module("nemo_automodel.components.distributed.mesh")
        mesh = meshes.MeshContext.build(config, meshes.ParallelismSizes(), world_size=world)
        parallelize = importlib.import_module("nemo_automodel.components.moe.parallelizer").parallelize_model
        parallelize(model, mesh.device_mesh, mesh.moe_mesh, **mesh.parallelize_axis_kwargs())
        moe_mesh = mesh.moe_mesh
    options = {"model_repo_id": str(base), "is_peft": True}
    return model, peer.checkpointer(target, dist.get_rank(), moe_mesh, **options)


def add_lora(model):
    """Give experts NeMo's own module of LoRA, and linear modules its parameters: theirs needs kernels for a GPU."""
    model.requires_grad_(False)
    experts = importlib.import_module("nemo_automodel.components._peft.lora_experts").GroupedExpertsLoRA
    for name, module in list(model.named_modules()):
        if name.endswith("moe.experts"):
            model.get_submodule(name.rpartition(".")[0]).experts = experts(module, lora_dim=R + 1, alpha=2 * R)
        if isinstance(module, torch.nn.Linear) and not any(fnmatch(name, pattern) for pattern in EXCLUDED):
            module.lora_A = torch.nn.Linear(module.in_features, R, bias=False)
            module.lora_B = torch.nn.Linear(R, module.out_features, bias=False)


def trained(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]


def lora_of(model):
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in trained(model)
    }
