"""NeMo AutoModel's Gemma 4 MoE adapter and model, as black boxes; the import takes ten seconds, so on first use."""

import importlib
import warnings
from functools import cache
from types import SimpleNamespace

import torch

_PACKAGE = "nemo_automodel.components.models"


@cache
def _module(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{_PACKAGE}.{name}")


def import_all():
    """Import all that is used here, with its warnings left out."""
    for name in ("common", "gemma4_moe.model", "gemma4_moe.state_dict_adapter"):
        _module(name)


def adapter(E, H, I, dtype):  # noqa: E741
    """The peer's adapter for E experts of inner size I and hidden size H, whose experts become `dtype`."""
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    moe_config = SimpleNamespace(n_routed_experts=E, moe_inter_dim=I, dim=H)
    return adapter_class()(config, moe_config, None, dtype=dtype)


def adapter_class():
    """The peer's class."""
    return _module("gemma4_moe.state_dict_adapter").Gemma4MoEStateDictAdapter


def model(config):
    """The peer's multimodal model on the CPU in fp32, with weights that are still to be loaded."""
    backend = _module("common").BackendConfig(
        attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = _module("gemma4_moe.model").Gemma4ForConditionalGeneration(config, backend=backend)
    return built.to(torch.float32).eval()


def checkpointer(directory, rank=0, moe_mesh=None, **options):
    """The peer's Checkpointer of one rank, for checkpoints below `directory`."""
    config = importlib.import_module("nemo_automodel.components.checkpoint.config").CheckpointingConfig
    return config(checkpoint_dir=directory, **options).build(rank, 0, 0, moe_mesh)
