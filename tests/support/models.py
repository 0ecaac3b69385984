"""Random state dicts and saved checkpoints for tests. Sizes are all different, scales are never ones."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.formulas import legacy_name

#: The experts' names in the first layer of a random state dict.
LAYER = "model.language_model.layers.0."
GATE_UP, DOWN, SCALE = f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj", f"{LAYER}router.per_expert_scale"
NATIVE_GATE_UP, NATIVE_DOWN = f"{LAYER}moe.experts.gate_and_up_projs", f"{LAYER}moe.experts.down_projs"


def random_hf_state_dict(
    *,
    prefix="model.language_model.",
    layers=2,
    E=6,
    H=10,
    I=7,  # noqa: E741
    dtype=torch.bfloat16,
    seed=0,
):
    """The hf state dict, current spelling, of `layers` decoder layers and an embedding, all tensors in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def uniform(*shape):
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


class Lazy:
    """A value in the protocol of safetensors' slices; `read` has the number of elements of each part that was read."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.read: list[int] = []

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        return {torch.bfloat16: "BF16", torch.int8: "I8", torch.float32: "F32"}[self.tensor.dtype]

    def __getitem__(self, index):
        part = self.tensor[index].clone()
        self.read.append(part.numel())
        return part


def module_of(state):
    """A tree of modules whose parameters are these tensors, and `layer_scalar` and other statistics its buffers."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        if last in ("layer_scalar", "std_bias", "std_scale"):
            owner.register_buffer(last, tensor)
        else:
            owner.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def read_directory(directory):
    """Every tensor of a directory of safetensors files, as safetensors' own reader reads it."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys(), f"{file} repeats tensors of another file"
        tensors |= found
    return tensors


def respell_as_legacy(directory):
    """Rename the experts' tensors of a saved hf checkpoint to the legacy spelling."""
    rename_tensors(directory, legacy_name)


def rename_tensors(directory, rename):
    """Give the tensors of a checkpoint other names, in its files and its index."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, metadata)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True))
