"""Quantised checkpoints of the forms that are read, and the values that the forms' own libraries give them.

compressed-tensors' compressors quantise and dequantise their own forms. transformers dequantises its own; ModelOpt has
no package without CUDA here, and its published rule is written out in a few lines of torch.
"""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from support.checkpoints import config_of, write_checkpoint
from support.models import random_hf_state_dict
from support.published import per_expert_as

E, H, I = 3, 32, 48  # noqa: E741
BLOCK = (20, 12)  # divides neither 2I, I nor H, so that the last blocks are parts

E4M3 = torch.float8_e4m3fn


def plain():
    """The hf state dict that is quantised, fused; attention's weight too."""
    generator = torch.Generator().manual_seed(5)
    state = random_hf_state_dict(E=E, H=H, I=I)
    for layer in range(2):
        path = f"model.language_model.layers.{layer}."
        state[f"{path}self_attn.q_proj.weight"] = torch.randn(16, H, generator=generator).bfloat16()
        state[f"{path}self_attn.o_proj.weight"] = torch.randn(H, 16, generator=generator).bfloat16()
    return state


#: The linear weights that a quantised checkpoint leaves as they are, as its config lists them.
LEFT = ["router.proj", "o_proj", "mlp.down_proj"]


def modules_left(state, style):
    """The list of a library's config for the modules that are not quantised."""
    names = [name.removesuffix(".weight") for name in state if name.removesuffix(".weight").endswith(tuple(LEFT))]
    if style == "modelopt":
        return ["*.o_proj", "*router*", "*.mlp*", "lm_head"]
    return ["re:.*o_proj$", *(name for name in names if "o_proj" not in name)] if style == "ct" else [*LEFT]


def is_quantised(name):
    return "experts." in name or name.endswith("q_proj.weight")


def quantised(state, quantise, *, ending=None):
    """The stored state dict and the plain one, if `quantise` gives a weight's stored tensors and its values."""
    stored, values = {}, {}
    for name, tensor in state.items():
        if is_quantised(name):
            own, values[name] = quantise(name, tensor)
            stored |= own
        else:
            stored[name] = values[name] = tensor
    return stored, values


def compressor_of(scheme):
    kind = {8: "float-quantized", 4: "nvfp4-pack-quantized"}[scheme.weights.num_bits]
    return BaseCompressor.get_value_from_registry(kind)


def by_compressed_tensors(args, scales, scale_dtype):
    """Quantises as compressed-tensors does; `scales` gives a weight's scale in fp32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def quantise(name, tensor):
        path = name.removesuffix("weight")
        compressor = compressor_of(scheme)
        state = {"weight": tensor.float()} | scales(tensor.float())
        if scale_dtype is not None:
            state["weight_scale"] = state["weight_scale"].to(scale_dtype)
        stored = compressor.compress(state, scheme)
        value = compressor.decompress(dict(stored), scheme)["weight"]
        return {path + key: part for key, part in stored.items()}, value

    return quantise


def block_amax(tensor, block):
    rows, columns = tensor.shape
    grid = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            part = tensor[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            grid[r, c] = part.abs().max()
    return grid


SCALES = {
    "tensor": lambda w: {"weight_scale": w.abs().max().reshape(1) / 440},
    "channel": lambda w: {"weight_scale": w.abs().amax(1, keepdim=True) / 440},
    "block": lambda w: {"weight_scale": block_amax(w, BLOCK) / 440},
}


def ct_fp8(strategy, scale_dtype):
    def make(state):
        args = QuantizationArgs(
            num_bits=8,
            type="float",
            symmetric=True,
            strategy=QuantizationStrategy(strategy),
            block_structure=list(BLOCK) if strategy == "block" else None,
        )
        single = per_expert_as("experts", ".weight")(state)
        stored, values = quantised(single, by_compressed_tensors(args, SCALES[strategy], scale_dtype))
        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
        weights["block_structure"] = list(BLOCK) if strategy == "block" else None
        said = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": modules_left(single, "ct"),
        }
        return stored, values, said

    return make


def expand(scale, shape, block):
    """A grid of scales [..., r, c] as one scale an element."""
    return scale.repeat_interleave(block[0], -2)[..., : shape[-2], :].repeat_interleave(block[1], -1)[..., : shape[-1]]


def transformers_fp8(*, fused):
    def make(state):
        state = state if fused else per_expert_as("experts", ".weight")(state)

        def quantise(name, tensor):
            matrices = tensor.reshape(-1, *tensor.shape[-2:]).float()
            scale = torch.stack([block_amax(matrix, BLOCK) for matrix in matrices]) / 440
            scale = scale.reshape(*tensor.shape[:-2], *scale.shape[-2:])
            wide = expand(scale, tensor.shape, BLOCK)
            numbers = (tensor.float() / wide).to(E4M3)
            stored = {name: numbers, f"{name}_scale_inv": scale}
            return stored, (numbers.float() * wide).bfloat16()

        stored, values = quantised(state, quantise)
        said = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": modules_left(state, "hf"),
        }
        return stored, values, said

    return make


def by_transformers(numbers, scale):
    """transformers' own dequantised weight, of blocks that divide it."""
    return Fp8Dequantize(None)._dequantize_one(numbers, scale, torch.bfloat16)


def modelopt_fp8(kind, *, fused):
    def make(state):
        state = state if fused else per_expert_as("moe.experts", ".weight")(state)

        def quantise(name, tensor):
            axes = (-1,) if kind == "channel" else tuple(range(-2, 0))
            scale = tensor.float().abs().amax(axes) / 440
            wide = scale.reshape(*scale.shape, *(1,) * (tensor.dim() - scale.dim()))
            numbers = (tensor.float() / wide).to(E4M3)
            names = f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale"
            activation = names.replace("weight_scale", "input_scale")
            stored = {name: numbers, names: scale, activation: torch.tensor(0.37)}
            return stored, (numbers.float() * wide).bfloat16()

        stored, values = quantised(state, quantise)
        stored["model.language_model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
        said = {
            "quant_method": "modelopt",
            "quant_algo": "FP8" if kind == "tensor" else "FP8_PER_CHANNEL_PER_TOKEN",
            "ignore": modules_left(state, "modelopt"),
        }
        return stored, values, said

    return make


def ct_nvfp4(state):
    """compressed-tensors' NVFP4: packed by the library from scales that are computed here."""
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)

    def scales(weight):
        top = (448 * 6 / weight.abs().max()).reshape(1)
        groups = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
        return {"weight_scale": (groups * top / 6).to(E4M3).float(), "weight_global_scale": top}

    single = per_expert_as("experts", ".weight")(state)
    stored, values = quantised(single, by_compressed_tensors(args, scales, None))
    for name in [name for name in stored if name.endswith("weight_packed")]:
        stored[name.replace("weight_packed", "input_global_scale")] = torch.tensor([31.5])
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    said = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": modules_left(single, "ct"),
    }
    return stored, values, said


#: ModelOpt's table of e2m1, as published: code 8 is 0, not -0.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def modelopt_nvfp4(*, fused):
    def make(state):
        state = state if fused else per_expert_as("experts", ".weight")(state)

        def quantise(name, tensor):
            weight = tensor.float()
            second = weight.abs().amax((-2, -1)) / (6 * 448)
            each = second.reshape(*second.shape, *(1,) * 2)
            groups = (weight.unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * each)).to(E4M3)
            factors = groups.float() * each
            scaled = weight.unflatten(-1, (-1, 16)) / factors[..., None]
            codes = (scaled[..., None] - E2M1[:8].float()).abs().argmin(-1)
            codes = torch.where(scaled < 0, (scaled[..., None] - E2M1[8:]).abs().argmin(-1) + 8, codes).flatten(-2)
            packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
            value = (E2M1[codes].unflatten(-1, (-1, 16)) * factors[..., None]).flatten(-2).bfloat16()
            ending = f"{name}_" if name.endswith(".weight") else f"{name}_weight_"
            activation = ending.replace("weight_", "input_scale")
            parts = {f"{ending}scale": groups, f"{ending}scale_2": second, activation: torch.tensor(0.37)}
            return {name: packed} | parts, value

        stored, values = quantised(state, quantise)
        said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": modules_left(state, "modelopt")}
        return stored, values, said

    return make


#: By the name in docs/forms.md, and a word for the variant: a state dict → stored tensors, values, quantization_config.
FORMS = {
    ("compressed-tensors FP8", "channel"): ct_fp8("channel", torch.bfloat16),
    ("compressed-tensors FP8", "tensor"): ct_fp8("tensor", torch.bfloat16),
    ("compressed-tensors FP8", "block"): ct_fp8("block", torch.bfloat16),
    ("compressed-tensors FP8", "channel fp32"): ct_fp8("channel", torch.float32),
    ("FP8 in blocks", "fused"): transformers_fp8(fused=True),
    ("FP8 in blocks", "single"): transformers_fp8(fused=False),
    ("ModelOpt FP8", "tensor"): modelopt_fp8("tensor", fused=False),
    ("ModelOpt FP8", "channel"): modelopt_fp8("channel", fused=False),
    ("ModelOpt FP8", "tensor fused"): modelopt_fp8("tensor", fused=True),
    ("ModelOpt FP8", "channel fused"): modelopt_fp8("channel", fused=True),
    ("compressed-tensors NVFP4", "single"): ct_nvfp4,
    ("ModelOpt NVFP4", "single"): modelopt_nvfp4(fused=False),
    ("ModelOpt NVFP4", "fused"): modelopt_nvfp4(fused=True),
}


def write(directory, form, *, change=None):
    """Write a quantised checkpoint of a form, and return the plain state dict that it is read as."""
    state = plain()
    stored, values, said = FORMS[form](state)
    if change is not None:
        change(stored, said)
    config = config_of(state) | {"dtype": "bfloat16", "quantization_config": said}
    write_checkpoint(directory, stored, config, files=3)
    return values
