"""One state dict verified against another, and the ways in which tests damage tensors."""

import torch

from gemma4_moe.verifier.verify import verify
from support.checkpoints import config_of, write_checkpoint
from support.formulas import hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict

State = dict[str, torch.Tensor]

LAYER = "model.language_model.layers.1."
DOWN, GATE_UP, SCALE = (
    LAYER + rest for rest in ("experts.down_proj", "experts.gate_up_proj", "router.per_expert_scale")
)
DOWNS, GATE_UPS = LAYER + "moe.experts.down_projs", LAYER + "moe.experts.gate_and_up_projs"

UNSIGNED = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def both_layouts(**sizes):
    """A random hf state dict, its nemo one, and the hf one that this gives without a base."""
    hf = random_hf_state_dict(**sizes)
    nemo = nemo_from_hf(hf)
    return hf, nemo, hf_from_nemo(nemo)


def checked(tmp_path, source, target, *, hf=None, **options):
    """Write both, in unlike numbers of files and with the config of `hf` if the source is not hf, and verify them."""
    config = config_of(source if hf is None else hf)
    write_checkpoint(tmp_path / "source", source, config, files=2)
    write_checkpoint(tmp_path / "target", target, config, files=3)
    return verify(tmp_path / "source", tmp_path / "target", **options)


def judged(tmp_path, target, hf):
    """Verify another target against the "source" that `checked` wrote; the config is that of `hf`."""
    write_checkpoint(tmp_path / "other", target, config_of(hf))
    return verify(tmp_path / "source", tmp_path / "other")


def sole(result):
    """The only difference of a verification."""
    assert len(result.different) == 1, [str(difference) for difference in result.different]
    assert result.equal == result.tensors - 1
    return result.different[0]


def place(flat, tensor):
    """The index in `tensor` of an element that is counted in the flat one."""
    return tuple(int(axis) for axis in torch.unravel_index(torch.tensor(flat), tensor.shape))


def flip(tensor, flat, bit):
    """A copy of `tensor` in which one bit of one element, counted in the flat tensor, is the other one."""
    bits = tensor.contiguous().view(UNSIGNED[tensor.dtype]).clone()
    value = int(bits.view(-1)[flat]) ^ (1 << bit)
    bits.view(-1)[flat] = value
    return bits.view(tensor.dtype)
