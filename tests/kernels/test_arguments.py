"""What the public functions accept, refuse and promise about memory."""

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma4_moe import kernels
from gemma4_moe.errors import TensorShapeError, UsageError


def ones(*shape, dtype=torch.bfloat16):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("make", [torch.ones, np.ones], ids=["tensor", "array"])
def test_wrong_shapes_and_dtypes_are_refused(make):
    x = make((3, 4, 5))
    x = x.astype(np.float32) if isinstance(x, np.ndarray) else x
    with pytest.raises(TensorShapeError, match="no two axes"):
        kernels.transpose_scale_cast(x[0, 0])
    with pytest.raises(TensorShapeError, match="no two axes"):
        kernels.transpose_scale_cast(x[0], scale=x[0, 0])
    with pytest.raises(TensorShapeError, match="one scale an expert"):
        kernels.transpose_scale_cast(x, scale=x[0, :, 0])
    with pytest.raises(TensorShapeError, match="out does not fit"):
        kernels.transpose_scale_cast(x, out=x)
    with pytest.raises(TensorShapeError, match="out does not fit"):
        kernels.scale_cast(x, dtype=np.float16 if isinstance(x, np.ndarray) else torch.float16, out=x)


@pytest.mark.parametrize("kernel", ["auto", "numpy", "torch"])
def test_other_dtypes_are_copied_and_never_the_result_of_arithmetic(kernel):
    for x, other in (
        (np.arange(24.0).reshape(2, 3, 4), (ml_dtypes.float8_e4m3fn, np.float64)),
        (torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4), (torch.float8_e4m3fn, torch.float64)),
    ):
        copied = kernels.transpose_scale_cast(x, kernel=kernel)
        assert copied.dtype == x.dtype
        assert (copied == x.swapaxes(1, 2)).all()
        with pytest.raises(UsageError, match="no kernel rounds to this dtype") as raised:
            kernels.scale_cast(x, dtype=other[0], kernel=kernel)
        assert raised.value.facts["found"].endswith("float8_e4m3fn")
        with pytest.raises(UsageError, match="no kernel rounds to this dtype"):
            kernels.scale_cast(x, scale=x[:, 0, 0], dtype=other[1], kernel=kernel)


def test_results_that_share_memory_with_themselves_are_refused():
    with pytest.raises(TensorShapeError, match="can't be written"):
        kernels.scale_cast(ones(3, 4), out=ones(3, 1).expand(3, 4))
    frozen = np.zeros((3, 4), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(TensorShapeError, match="can't be written"):
        kernels.scale_cast(np.ones((3, 4), np.float32), out=frozen)


def test_results_go_to_the_tensor_that_was_given_which_names_the_dtype():
    out = torch.zeros(2, 5, 3, dtype=torch.float32)
    assert kernels.transpose_scale_cast(ones(2, 3, 5), scale=torch.tensor([2, 3]), out=out) is out
    assert out.mean((1, 2)).tolist() == [2, 3]
    array = np.zeros((5, 3), np.float16)
    assert kernels.transpose_scale_cast(np.ones((3, 5), np.float32), out=array) is array
    assert array.all()
    native = torch.nn.Parameter(ones(2, 3, 5).transpose(1, 2))
    assert kernels.scale_in_place(native, torch.tensor([0.5, -4.0])) is native
    assert native.detach().float().mean((1, 2)).tolist() == [0.5, -4.0]


def test_no_gradient_flows_and_the_input_is_not_modified():
    x = torch.nn.Parameter(torch.randn(2, 33, 70))
    kept = x.detach().clone()
    for kernel in ("auto", "cpu", "torch"):
        found = kernels.transpose_scale_cast(x, scale=torch.tensor([3.0, 0.5]), dtype=torch.bfloat16, kernel=kernel)
        assert not found.requires_grad
        assert torch.equal(x, kept)


def test_new_arrays_begin_at_a_whole_line():
    for _ in range(5):
        assert kernels.transpose_scale_cast(np.ones((3, 5, 7), np.float32)).ctypes.data % 64 == 0
