"""Random state dicts and saved checkpoints for tests. Sizes are all different, scales are never ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.formulas import legacy_name

if TYPE_CHECKING:
    from pathlib import Path


def random_hf_state_dict(
    *,
    prefix: str = "model.language_model.",
    layers: int = 2,
    E: int = 6,
    H: int = 10,
    I: int = 7,  # noqa: E741
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The hf state dict, current spelling, of `layers` decoder layers and an embedding, all tensors in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)

    state = {f"{prefix}embed_tokens.weight": normal(11, H)}
    for layer in range(layers):
        path = f"{prefix}layers.{layer}."
        state |= {
            f"{path}experts.down_proj": normal(E, H, I),
            f"{path}experts.gate_up_proj": normal(E, 2 * I, H),
            f"{path}input_layernorm.weight": uniform(H),
            f"{path}layer_scalar": uniform(1),
            f"{path}mlp.down_proj.weight": normal(H, 3),
            f"{path}router.per_expert_scale": uniform(E),
            f"{path}router.proj.weight": normal(E, H),
            f"{path}router.scale": uniform(H),
        }
    return state


def read_directory(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of safetensors files, as safetensors' own reader reads it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys(), f"{file} repeats tensors of another file"
        tensors |= found
    return tensors


def respell_as_legacy(directory: Path) -> None:
    """Rename the experts' tensors of a saved hf checkpoint, in its files and its index, to the legacy spelling."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({legacy_name(name): tensor for name, tensor in load_file(file).items()}, file, metadata)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {legacy_name(name): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content, indent=2, sort_keys=True))
