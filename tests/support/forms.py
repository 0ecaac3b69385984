"""Two published forms that nobody has published, and the tensors of a model in each, cut with plain torch.

`BANKS` stores gate and up apart, all experts in one tensor; `SINGLE` stores each expert in tensors of its own.
"""

from gemma4_moe.layout import spellings
from gemma4_moe.layout.spellings.base import Spelling
from gemma4_moe.layout.table import DOWN, GATE_UP, SCALE

BANKS = Spelling("banks", {GATE_UP: ("ffn.bank.gate", "ffn.bank.up"), DOWN: ("ffn.bank.down",)})

SINGLE = Spelling(
    "single", {GATE_UP: ("moe.w{}.one", "moe.w{}.three"), DOWN: ("moe.w{}.two.weight",), SCALE: ("moe.alpha",)}
)


def register():
    """Add both forms to the registry of this process, if they aren't there."""
    spellings.SPELLINGS = (*(form for form in spellings.SPELLINGS if form not in (BANKS, SINGLE)), BANKS, SINGLE)


def banks(hf):
    """An hf state dict in current spelling, in the form `BANKS`."""
    found = {}
    for name, tensor in hf.items():
        path, _, last = name.rpartition("experts.")
        if last == "gate_up_proj":
            inner = tensor.shape[1] // 2
            found[path + "ffn.bank.up"] = tensor[:, inner:].contiguous()
            found[path + "ffn.bank.gate"] = tensor[:, :inner].contiguous()
        elif last == "down_proj":
            found[path + "ffn.bank.down"] = tensor
        else:
            found[name] = tensor
    return found


def single(hf):
    """An hf state dict in current spelling, in the form `SINGLE`; the experts are in no order."""
    found = {}
    for name, tensor in hf.items():
        path, _, last = name.rpartition("experts.")
        if last == "gate_up_proj":
            inner = tensor.shape[1] // 2
            for expert in sorted(range(len(tensor)), key=lambda number: number * 5 % 7):
                found[f"{path}moe.w{expert}.three"] = tensor[expert, inner:].contiguous()
                found[f"{path}moe.w{expert}.one"] = tensor[expert, :inner].contiguous()
        elif last == "down_proj":
            for expert in reversed(range(len(tensor))):
                found[f"{path}moe.w{expert}.two.weight"] = tensor[expert].contiguous()
        elif name.endswith("router.per_expert_scale"):
            found[name.removesuffix("router.per_expert_scale") + "moe.alpha"] = tensor
        else:
            found[name] = tensor
    return found


FORMS = {"banks": banks, "single": single}
