"""NeMo AutoModel's Gemma 4 MoE adapter and model, as black boxes; the import takes ten seconds, so on first use."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

_PACKAGE = "nemo_automodel.components.models"


@cache
def _module(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{_PACKAGE}.{name}")


def adapter(E: int, H: int, I: int, dtype: torch.dtype) -> Any:  # noqa: E741
    """The peer's adapter for E experts of inner size I and hidden size H, whose experts become `dtype`."""
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    moe_config = SimpleNamespace(n_routed_experts=E, moe_inter_dim=I, dim=H)
    cls = _module("gemma4_moe.state_dict_adapter").Gemma4MoEStateDictAdapter
    return cls(config, moe_config, None, dtype=dtype)


def model(config: Any) -> torch.nn.Module:
    """The peer's multimodal model on the CPU in fp32, with weights that are still to be loaded."""
    backend = _module("common").BackendConfig(
        attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built: torch.nn.Module = _module("gemma4_moe.model").Gemma4ForConditionalGeneration(config, backend=backend)
    return built.to(torch.float32).eval()


def checkpointer(directory: Path, rank: int = 0, moe_mesh: Any = None, **options: Any) -> Any:
    """The peer's Checkpointer of one rank, for checkpoints below `directory`."""
    config = importlib.import_module("nemo_automodel.components.checkpoint.config").CheckpointingConfig
    return config(checkpoint_dir=directory, **options).build(rank, 0, 0, moe_mesh)
