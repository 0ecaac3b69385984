"""LoRA adapters for tests, built by explicit loops over names: values that owe nothing to the code under test."""

import json

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def random_native(
    *,
    path="model.language_model.",
    layers=(0, 1),
    E=6,
    H=10,
    I=7,  # noqa: E741
    r=3,
    rank=5,
    dtype=torch.float32,
    linear=(("self_attn.q_proj", 12, 10), ("mlp.down_proj", 10, 9)),
):
    """NeMo's own tensors of an adapter: experts of rank `r`, linear modules and the router of rank `rank`.

    `linear` has the name, the rows and the columns of each linear module.
    """
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    state = {}
    for layer in layers:
        own = f"{PREFIX}{path}layers.{layer}."
        state |= {
            f"{own}moe.experts.lora_gate_and_up_A": normal(E, H, r),
            f"{own}moe.experts.lora_gate_and_up_B": normal(E, r, 2 * I),
            f"{own}moe.experts.lora_down_A": normal(E, I, r),
            f"{own}moe.experts.lora_down_B": normal(E, r, H),
        }
        for module, rows, columns in linear:
            state[f"{own}{module}.lora_A.weight"] = normal(rank, columns)
            state[f"{own}{module}.lora_B.weight"] = normal(rows, rank)
        state[f"{own}moe.gate.proj.lora_A.weight"] = normal(rank, H)
        state[f"{own}moe.gate.proj.lora_B.weight"] = torch.zeros(E, rank, dtype=dtype)
    return state


def write_adapter(directory, state, config, native=None):
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if native is not None:
        (directory / "automodel_peft_config.json").write_text(json.dumps(native))
    return directory


def native_config(rank=5, alpha=10, **more):
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"} | more


def scales_of(layers=(0, 1), E=6, path="model.language_model.", seed=9):
    """Scales far from one, by their names; none is a power of two."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}layers.{layer}.router.per_expert_scale": (torch.rand(E, generator=generator) * 3 + 0.3)
        for layer in layers
    }
