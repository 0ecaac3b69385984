"""The kernel that is taken by default, on request and without the extension, and that nothing goes past them."""

import logging
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_moe import Gemma4MoEStateDictAdapter, kernels
from gemma4_moe.errors import UsageError
from gemma4_moe.kernels import choice, numpy_kernel, torch_kernel
from support.formulas import nemo_from_hf
from support.models import random_hf_state_dict
from support.rounding import FACTORS, FP32, assert_same_bits, expected

X = np.linspace(-3, 3, 2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7)

#: Operations that allocate or view.
FREE = {"empty", "detach", "transpose", "select", "slice", "view", "alias", "as_strided", "expand", "unsqueeze"}


@pytest.fixture
def without_extension(monkeypatch):
    caches = (choice.cpu, choice._extension_or_say_so)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "gemma4_moe.kernels._cpu", None)
    monkeypatch.delattr(kernels, "_cpu", raising=False)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The names of the slow kernels that were called."""
    called = []
    for module, name in ((numpy_kernel, "numpy"), (torch_kernel, "torch")):
        original = module.scale_cast
        monkeypatch.setattr(
            module, "scale_cast", lambda *args, name=name, original=original: called.append(name) or original(*args)
        )
    return called


def test_the_extension_is_built():
    """Where the tests run it must be: without it everything would still be right, and slow."""
    found = kernels.available()
    assert found["cpu"].usable, found["cpu"].detail
    assert f"{choice.allowed_cores()} threads" in found["cpu"].detail
    assert found["numpy"].usable
    assert set(found) == set(choice.NAMES) - {"auto"}


def test_arrays_and_cpu_tensors_take_the_extension(calls):
    kernels.transpose_scale_cast(X, scale=FACTORS[:2])
    kernels.transpose_scale_cast(torch.from_numpy(X), scale=torch.from_numpy(FACTORS[:2]))
    assert calls == []


def test_unknown_dtypes_and_wrapped_tensors_take_the_general_kernels(calls):
    assert kernels.scale_cast(X.astype(np.int64)).dtype == np.int64
    assert kernels.transpose_scale_cast(torch.from_numpy(X).double()).dtype == torch.float64
    wrapped = torch.from_numpy(X).as_subclass(type("Wrapped", (torch.Tensor,), {}))
    kernels.transpose_scale_cast(wrapped)
    assert calls == ["numpy", "torch", "torch"]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_kernel_by_name_in_the_call_or_in_the_environment_which_takes_the_place_of_auto_only(
    monkeypatch, calls, name
):
    kernels.scale_cast(X, kernel=name)
    kernels.scale_cast(torch.from_numpy(X), kernel=name)
    assert calls == ["numpy", "torch"]
    monkeypatch.setenv(choice.ENVIRONMENT, name)
    kernels.scale_cast(torch.from_numpy(X))
    kernels.scale_cast(torch.from_numpy(X), kernel="cpu")
    assert calls == ["numpy", "torch", "torch"]


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="unknown kernel"):
        kernels.scale_cast(X, kernel="fast")
    monkeypatch.setenv(choice.ENVIRONMENT, "CPU")
    with pytest.raises(UsageError, match="unknown kernel"):
        kernels.scale_cast(torch.from_numpy(X))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a device")
def test_triton_without_a_device_is_refused():
    assert not kernels.available()["triton"].usable
    with pytest.raises(UsageError, match="triton"):
        kernels.scale_cast(torch.from_numpy(X), kernel="triton")
    with pytest.raises(UsageError, match="can't work on this"):
        kernels.scale_cast(X, kernel="triton")


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_it_works_and_says_so_once(calls, caplog):
    with caplog.at_level(logging.WARNING):
        found = [kernels.transpose_scale_cast(X, scale=FACTORS[:2]) for _ in range(2)]
        found.append(kernels.transpose_scale_cast(torch.from_numpy(X), scale=torch.from_numpy(FACTORS[:2])).numpy())
    for result in found:
        assert_same_bits(result, expected(X, FACTORS[:2], FP32).swapaxes(1, 2))
    assert calls == ["numpy", "numpy", "torch"]
    assert [record.message for record in caplog.records if "C++ compiler" in record.message] == [caplog.messages[0]]
    assert not kernels.available()["cpu"].usable
    with pytest.raises(UsageError, match="not available"):
        kernels.scale_cast(X, kernel="cpu")


def test_meta_and_fake_tensors_compute_nothing():
    x = torch.empty(4, 6, 10, dtype=torch.bfloat16, device="meta")
    found = kernels.transpose_scale_cast(x, scale=torch.empty(4, device="meta"), dtype=torch.float32)
    assert (found.shape, found.dtype, found.device.type) == ((4, 10, 6), torch.float32, "meta")
    assert found.is_contiguous()
    assert kernels.scale_in_place(x, torch.empty(4, device="meta")) is x
    with FakeTensorMode():
        x = torch.empty(4, 6, 10, dtype=torch.bfloat16)
        assert kernels.transpose_scale_cast(x, scale=torch.empty(4), dtype=torch.float32).shape == (4, 10, 6)


def test_ml_dtypes_arrays_and_torch_tensors_give_the_same_bits():
    x = X.astype(ml_dtypes.bfloat16)
    as_array = kernels.transpose_scale_cast(x, scale=FACTORS[3:5])
    tensor = torch.from_numpy(X).bfloat16()
    as_tensor = kernels.transpose_scale_cast(tensor, scale=torch.from_numpy(FACTORS[3:5]))
    assert (as_array.view(np.int16) == as_tensor.view(torch.int16).numpy()).all()


class ExpertOperations(TorchDispatchMode):
    """Names the operations on tensors of three axes that do more than allocate or view."""

    def __init__(self):
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
def test_the_adapter_moves_expert_bytes_through_kernels_alone(dtype):
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
