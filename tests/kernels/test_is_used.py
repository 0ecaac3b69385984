"""Expert bytes go through the kernels: torch's own operations neither transpose, scale, cast nor copy them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gemma4_moe
from gemma4_moe import Gemma4MoEStateDictAdapter
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict

FREE = {"empty", "detach", "transpose", "select", "slice", "view", "alias", "as_strided", "expand", "unsqueeze"}


class ExpertOperations(TorchDispatchMode):
    """Names the operations on tensors of three axes that do more than allocate or view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name not in FREE and any(tensor.ndim == 3 for tensor in tensors):
            self.names.append(name)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_adapter(dtype):
    adapter = Gemma4MoEStateDictAdapter(None, None, None, dtype=dtype)
    hf = random_hf_state_dict()
    nemo = {name: tensor.to(dtype) for name, tensor in nemo_from_hf(hf).items()}
    with ExpertOperations() as seen:
        adapter.from_hf(dict(hf))
        adapter.to_hf(dict(nemo))
        for name, tensor in nemo.items():
            adapter.convert_single_tensor_to_hf(name, tensor)
        into = adapter.to_hf(dict(nemo), for_checkpoint_load=True)
        for name, tensor in into.items():
            if name.endswith("per_expert_scale"):
                tensor.copy_(hf[name])
        adapter.from_hf(into)
    assert seen.names == []


def test_the_watch_sees_torch_transpose():
    with ExpertOperations() as seen:
        torch.ones(2, 3, 5).transpose(1, 2).contiguous()
    assert "clone" in seen.names


def test_nothing_is_transposed_and_then_copied():
    """No `x.transpose(...).contiguous()`, `np.ascontiguousarray(x.swapaxes(...))` or the like in any module."""
    views = {"transpose", "swapaxes", "permute", "swapdims", "movedim", "moveaxis", "mT", "T"}
    copies = {"contiguous", "clone", "copy", "ascontiguousarray", "copy_", "to", "astype"}
    for path in sorted(Path(gemma4_moe.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in copies
            ):
                continue
            attributes = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            assert not attributes & views, f"{path}:{node.lineno}"
