"""What a weight stream must give, by explicit names and plain torch, and its bytes for a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from support.formulas import hf_from_nemo

if TYPE_CHECKING:
    from collections.abc import Iterable


def per_expert(hf: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
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


def in_order(nemo: dict[str, torch.Tensor], *, layers: int) -> dict[str, torch.Tensor]:
    """The hf state dict of a small native one, sorted as a person would: for fewer than ten layers, by name."""
    assert layers < 10
    return dict(sorted(hf_from_nemo(nemo).items()))


def assert_same_stream(found: Iterable[tuple[str, torch.Tensor]], expected: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Compare names, order, shapes, dtypes and every bit."""
    left, right = list(found), list(expected)
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, tensor), (_, other) in zip(left, right, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        assert tensor.is_contiguous(), name
        assert raw(tensor) == raw(other), name


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in the order of its elements."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
