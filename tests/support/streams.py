"""What a weight stream must give, by explicit names and plain torch, and its bytes for a comparison."""

import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from support.formulas import hf_from_nemo, nemo_from_hf
from support.models import random_hf_state_dict

E, H, I = 6, 10, 7  # noqa: E741
LARGEST = E * 2 * I * H * 2  # gate_up_proj in bfloat16, bytes
ADAPTER = Gemma4MoEStateDictAdapter(None, MoEConfig(E, H, I), None)


def nemo_state(layers=3, dtype=torch.bfloat16, prefix="model.language_model."):
    """The native state that most streams send."""
    return nemo_from_hf(random_hf_state_dict(layers=layers, E=E, H=H, I=I, dtype=dtype, prefix=prefix))


def per_expert(hf):
    """The tensors of an hf state dict in their order, each fused expert tensor as two-dimensional ones."""
    found = []
    for name, tensor in hf.items():
        path, _, last = name.rpartition(".")
        if last == "down_proj" and path.endswith("experts"):
            found += [(f"{path}.{e}.down_proj.weight", tensor[e]) for e in range(len(tensor))]
        elif last == "gate_up_proj" and path.endswith("experts"):
            inner = tensor.shape[1] // 2
            for e in range(len(tensor)):
                found.append((f"{path}.{e}.gate_proj.weight", tensor[e, :inner]))
                found.append((f"{path}.{e}.up_proj.weight", tensor[e, inner:]))
        else:
            found.append((name, tensor))
    return found


def expected_stream(nemo, *, experts="fused", dtype=None):
    """The hf tensors of a small native model, sorted as a person would: for fewer than ten layers, by name."""
    assert not any(".layers.10." in name for name in nemo)
    fused = {name: tensor.to(dtype or tensor.dtype) for name, tensor in sorted(hf_from_nemo(nemo).items())}
    return per_expert(fused) if experts == "per-expert" else list(fused.items())


def copied(buckets):
    """Copies of every tensor of these buckets."""
    return [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket.tensors()]


def assert_same_stream(found, expected):
    """Compare names, order, shapes, dtypes and every bit."""
    left, right = list(found), list(expected)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, tensor), (_, other) in zip(left, right, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        assert tensor.is_contiguous(), name
        assert raw(tensor) == raw(other), name


def raw(tensor):
    """The bytes of a tensor in the order of its elements."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
