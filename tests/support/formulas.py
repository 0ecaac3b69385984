"""Both layouts in plain torch, by explicit names: expected values that owe nothing to the code under test."""

import torch


def transposed(x, dtype):
    """x [E, R, C] as contiguous [E, C, R] in `dtype`."""
    return x.to(dtype).permute(0, 2, 1).contiguous()


def folded(down, scale, dtype):
    """down [E, H, I] times scale [E] as contiguous [E, I, H]: product in fp32, rounded once to `dtype`."""
    product = down.to(torch.float32) * scale.to(torch.float32)[:, None, None]
    return product.to(dtype).permute(0, 2, 1).contiguous()


def exact_fold(down, scale):
    """down [E, H, I] times scale [E] as [E, I, H] in fp64, where a product of two fp32 numbers is exact."""
    return (down.to(torch.float64) * scale.to(torch.float64)[:, None, None]).permute(0, 2, 1).contiguous()


#: The endings of the names that differ, in hf and in nemo.
NEMO_ENDINGS = {
    "experts.gate_up_proj": "moe.experts.gate_and_up_projs",
    "experts.down_proj": "moe.experts.down_projs",
    "router.proj.weight": "moe.gate.proj.weight",
    "router.scale": "moe.gate.scale",
}
#: In the current and in the legacy spelling of hf.
LEGACY_ENDINGS = {
    "experts.gate_up_proj": "moe.gate_up_proj",
    "experts.down_proj": "moe.down_proj",
    "router.per_expert_scale": "moe.per_expert_scale",
}


def renamed(name, endings):
    """The name with the other ending, or as it is if it has none of these."""
    for old, new in endings.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def nemo_from_hf(hf, dtype=None):
    """The nemo state dict of an hf one in current spelling; experts in `dtype`, or in the dtype that they have."""
    nemo = {}
    for name, tensor in hf.items():
        if name.endswith("experts.gate_up_proj"):
            tensor = transposed(tensor, dtype or tensor.dtype)
        elif name.endswith("experts.down_proj"):
            scale = hf[name.removesuffix("experts.down_proj") + "router.per_expert_scale"]
            tensor = folded(tensor, scale, dtype or tensor.dtype)
        if not name.endswith("router.per_expert_scale"):
            nemo[renamed(name, NEMO_ENDINGS)] = tensor
    return nemo


def hf_from_nemo(nemo, dtype=None):
    """The hf state dict of a nemo one without a base: native bits, and a scale of ones in the dtype of down_proj."""
    hf_endings = {native: hf for hf, native in NEMO_ENDINGS.items()}
    hf = {}
    for name, tensor in nemo.items():
        expert = name.endswith(("moe.experts.gate_and_up_projs", "moe.experts.down_projs"))
        hf[renamed(name, hf_endings)] = transposed(tensor, dtype or tensor.dtype) if expert else tensor
        if name.endswith("moe.experts.down_projs"):
            scale = name.removesuffix("moe.experts.down_projs") + "router.per_expert_scale"
            hf[scale] = torch.full((len(tensor),), 1.0, dtype=dtype or tensor.dtype)
    return hf


def legacy_name(name):
    """The legacy spelling of an hf name in current spelling."""
    return renamed(name, LEGACY_ENDINGS)


def assert_same_tensors(found, expected):
    """Fail unless both have the same names, shapes, dtypes and bits; −0.0 is not 0.0, one NaN is not another."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(_bits(found[name]), _bits(tensor)), f"{name} differs in its bits"


def _bits(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
