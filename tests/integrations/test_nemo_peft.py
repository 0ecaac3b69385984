"""LoRA through NeMo AutoModel's Checkpointer: what its adapter_config.json names, and which keys our adapter takes.

NeMo's LoRA modules need kernels for a GPU; its export goes by names, and so parameters of those names stand for them.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from gemma4_moe.demo.small_models import build_model
from gemma4_moe.errors import UnknownTensorError
from gemma4_moe.integrations import nemo_automodel
from support import peer

if TYPE_CHECKING:
    from pathlib import Path

E, H, I, R = 6, 64, 24, 3  # noqa: E741
OPTIONS = {"dim": R, "alpha": 2 * R, "use_dora": False}
LORA = SimpleNamespace(**OPTIONS, to_dict=lambda: OPTIONS)


@pytest.fixture
def model() -> Any:
    with nemo_automodel.installed():
        built = peer.model(build_model("multimodal").config)
    return built.requires_grad_(False)


def layers_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.startswith(LAYERS) and name.count(".") == 3]


LAYERS = "model.language_model.layers."


def add_lora_to_attention(model: Any) -> None:
    for layer in layers_of(model):
        projection = layer.self_attn.q_proj
        projection.lora_A = torch.nn.Linear(H, R, bias=False)
        projection.lora_B = torch.nn.Linear(R, projection.out_features, bias=False)


def add_lora_to_experts(model: Any) -> None:
    for layer in layers_of(model):
        layer.moe.experts.lora_down_A = torch.nn.Parameter(torch.ones(E, I, R))
        layer.moe.experts.lora_down_B = torch.nn.Parameter(torch.ones(E, R, H))


def checkpointer(directory: Path) -> Any:
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    return CheckpointingConfig(checkpoint_dir=directory, is_peft=True).build(0, 0, 0)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_lora_of_attention_is_saved_under_its_own_names_and_loaded_again(model: Any, tmp_path: Path) -> None:
    add_lora_to_attention(model)
    before = trained(model)
    assert len(before) == 4
    engine = checkpointer(tmp_path)
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


def test_lora_of_experts_is_refused_by_name_before_anything_is_written(model: Any, tmp_path: Path) -> None:
    add_lora_to_experts(model)
    with pytest.raises(UnknownTensorError, match="LoRA adapter") as refused:
        checkpointer(tmp_path).save_model(model, str(tmp_path), peft_config=LORA)
    assert refused.value.facts["tensor"] == f"base_model.model.{LAYERS}0.moe.experts.lora_down_A"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nemo_names_the_fused_experts_as_target_parameters(model: Any) -> None:
    from nemo_automodel.components.checkpoint import addons

    assert addons._extract_target_parameters(model) == []
    add_lora_to_experts(model)
    assert addons._extract_target_parameters(model) == ["experts.gate_up_proj", "experts.down_proj"]
    assert addons._extract_target_modules(model) == []  # or it would list each expert's projections besides
