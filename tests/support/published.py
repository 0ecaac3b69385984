"""The published forms of the hf layout, cut from a state dict in current spelling by plain slices of arrays.

Each function takes and returns a state dict of torch tensors. It names every tensor itself, as the form's own writer
does, and owes nothing to the registry.
"""

MULTIMODAL = "model.language_model."


def fused_as(gate_up, down, scale="router.per_expert_scale"):
    """The fused tensors under other names."""

    def form(hf):
        names = {"experts.gate_up_proj": gate_up, "experts.down_proj": down, "router.per_expert_scale": scale}
        found = {}
        for name, tensor in hf.items():
            old = next((old for old in names if name.endswith(f".{old}")), None)
            found[name if old is None else name.removesuffix(old) + names[old]] = tensor
        return found

    return form


def unfused_as(gate, up, down):
    """Gate and up apart, all experts in one tensor."""

    def form(hf):
        found = {}
        for name, tensor in hf.items():
            if name.endswith(".experts.gate_up_proj"):
                path, inner = name.removesuffix("experts.gate_up_proj"), tensor.shape[1] // 2
                found[path + up] = tensor[:, inner:].contiguous()
                found[path + gate] = tensor[:, :inner].contiguous()
            elif name.endswith(".experts.down_proj"):
                found[name.removesuffix("experts.down_proj") + down] = tensor
            else:
                found[name] = tensor
        return found

    return form


def per_expert_as(module, ending):
    """Three tensors for each expert, the last expert first."""

    def form(hf):
        found = {}
        for name, tensor in hf.items():
            path, _, last = name.rpartition("experts.")
            if last not in ("gate_up_proj", "down_proj"):
                found[name] = tensor
                continue
            for expert in reversed(range(len(tensor))):
                own, inner = tensor[expert], tensor.shape[1] // 2
                if last == "down_proj":
                    found[f"{path}{module}.{expert}.down_proj{ending}"] = own.contiguous()
                else:
                    found[f"{path}{module}.{expert}.gate_proj{ending}"] = own[:inner].contiguous()
                    found[f"{path}{module}.{expert}.up_proj{ending}"] = own[inner:].contiguous()
        return found

    return form


def mlx(hf):
    """MLX's sanitised names: nothing is transposed, and the model's modules are in another order."""
    module = "experts.switch_glu"
    apart = unfused_as(f"{module}.gate_proj.weight", f"{module}.up_proj.weight", f"{module}.down_proj.weight")(hf)
    return {mlx_name(name): tensor for name, tensor in apart.items()}


def mlx_name(name):
    if name.startswith(MULTIMODAL):
        return "language_model.model." + name.removeprefix(MULTIMODAL)
    return name.removeprefix("model.")


#: By the name that `inspect` gives it, and a word for the variant.
FORMS = {
    ("per-expert", "weight"): per_expert_as("experts", ".weight"),
    ("per-expert", "moe weight"): per_expert_as("moe.experts", ".weight"),
    ("per-expert", "plain"): per_expert_as("experts", ""),
    ("per-expert", "moe plain"): per_expert_as("moe.experts", ""),
    ("unfused", "plain"): unfused_as("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
    ("unfused", "weight"): unfused_as("experts.gate_proj.weight", "experts.up_proj.weight", "experts.down_proj.weight"),
    ("fused with .weight", ""): fused_as("experts.gate_up_proj.weight", "experts.down_proj.weight"),
    ("vLLM's fused names", "experts"): fused_as("experts.w13_weight", "experts.w2_weight"),
    ("vLLM's fused names", "moe"): fused_as("moe.experts.w13_weight", "moe.experts.w2_weight"),
    ("vLLM's fused names", "routed"): fused_as("experts.routed_experts.w13_weight", "experts.routed_experts.w2_weight"),
    ("current and legacy", "gate"): fused_as("moe.gate_up_proj", "experts.down_proj"),
    ("current and legacy", "down"): fused_as("experts.gate_up_proj", "moe.down_proj", "moe.per_expert_scale"),
    ("legacy", "of the router"): fused_as("moe.gate_up_proj", "moe.down_proj"),
    ("MLX", ""): mlx,
}
