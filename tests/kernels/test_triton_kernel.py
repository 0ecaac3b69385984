"""The Triton kernel: in its interpreter on the CPU, and on the device where one is there."""

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_moe import kernels
from support.raw_kernels import tensor
from support.rounding import BF16, FACTORS, FORMATS, FP32, assert_same_bits, expected, random_codes
from support.synchronisation import no_synchronisation

pytest.importorskip("triton")
ON_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_DEVICE else "cpu"

# NumPy, which computes for the interpreter, warns of the Infs and NaNs that are asked for.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

runs_kernels = pytest.mark.skipif(not (ON_DEVICE or INTERPRETED), reason="runs in the interpreter, in a process below")
needs_device = pytest.mark.skipif(not ON_DEVICE, reason="needs a CUDA device")


@pytest.mark.skipif(ON_DEVICE or INTERPRETED, reason="the kernels run in this very process")
def test_this_file_in_the_interpreter():
    """Triton decides at import whether it interprets, so the tests below get a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def array(x):
    return x.cpu().view(getattr(torch, f"int{8 * x.itemsize}")).numpy()


def assert_kernel_is_right(x, factors, target, *, transpose):
    """x and factors are arrays."""
    wanted = expected(x, factors, target)
    function = kernels.transpose_scale_cast if transpose else kernels.scale_cast
    found = function(
        tensor(x).to(DEVICE),
        scale=None if factors is None else torch.from_numpy(factors).to(DEVICE),
        dtype=getattr(torch, str(target)),
        kernel="triton",
    )
    assert_same_bits(array(found).view(target), wanted.swapaxes(-1, -2) if transpose else wanted)


@runs_kernels
@pytest.mark.parametrize("target", FORMATS, ids=str)
@pytest.mark.parametrize("source", FORMATS, ids=str)
def test_every_16_bit_value_and_random_fp32(source, target):
    factors = FACTORS if ON_DEVICE else FACTORS[[0, 1, 6, 12, 15]]
    if source.itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(source).reshape(1, 256, 256)
    else:
        values = random_codes(np.random.default_rng(3), (1, 256, 256), source)
    x = np.ascontiguousarray(np.broadcast_to(values, (len(factors), 256, 256)))
    assert_kernel_is_right(x, factors, target, transpose=True)
    assert_kernel_is_right(x[:1], None, target, transpose=True)


SIZES = st.sampled_from([0, 1, 5, 31, 32, 33, 64, 65, 100])


@runs_kernels
@settings(max_examples=60 if ON_DEVICE else 8, deadline=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    rows=SIZES,
    columns=SIZES,
    source=st.sampled_from(list(FORMATS)),
    target=st.sampled_from(list(FORMATS)),
    scaled=st.booleans(),
    transpose=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(leading, rows, columns, source, target, scaled, transpose, seed):
    rng = np.random.default_rng(seed)
    shape = (*leading, rows, columns)
    x = random_codes(rng, shape, source)
    factors = rng.choice(FACTORS, shape[0]) if scaled and leading else None
    assert_kernel_is_right(x, factors, target, transpose=transpose)


@runs_kernels
@pytest.mark.parametrize("transpose", [False, True])
def test_strided_input_and_a_slice_of_a_larger_result(transpose):
    rng = np.random.default_rng(1)
    source, target = BF16, FP32
    x = random_codes(rng, (3, 70, 90), source)
    strided = tensor(x).to(DEVICE).transpose(0, 2).contiguous().transpose(0, 2)[:, ::2, 1:]
    shape = (3, 89, 35) if transpose else (3, 35, 89)
    buffer = torch.zeros(4, 91, 91, dtype=torch.float32, device=DEVICE)
    out = buffer[1:, 1 : 1 + shape[1], 1 : 1 + shape[2]]
    function = kernels.transpose_scale_cast if transpose else kernels.scale_cast
    factors = FACTORS[3:6]
    function(strided, scale=torch.from_numpy(factors).to(DEVICE), out=out, kernel="triton")
    wanted = expected(np.ascontiguousarray(x[:, ::2, 1:]), factors, target)
    assert_same_bits(out.cpu().numpy(), np.ascontiguousarray(wanted.swapaxes(1, 2) if transpose else wanted))
    out.zero_()
    assert not buffer.any()


@runs_kernels
def test_in_place():
    rng = np.random.default_rng(2)
    x = random_codes(rng, (4, 33, 65), BF16)
    for native in (tensor(x).to(DEVICE), tensor(x).to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)):
        assert kernels.scale_in_place(native, torch.from_numpy(FACTORS[:4]).to(DEVICE), kernel="triton") is native
        assert_same_bits(array(native.contiguous()).view(x.dtype), expected(x, FACTORS[:4], x.dtype))


@needs_device
def test_chosen_for_cuda_tensors_without_waiting_and_replayed_from_a_graph():
    x = torch.randn(4, 96, 160, device="cuda", dtype=torch.bfloat16)
    factors = torch.tensor([1.37, 1.0, -2.5, 0.003], device="cuda")
    out = torch.empty(4, 160, 96, device="cuda")
    for watch in (nullcontext(), no_synchronisation()):  # the first time compiles
        with watch:
            kernels.transpose_scale_cast(x, scale=factors, out=out)
            kernels.transpose_scale_cast(x, scale=factors)
            kernels.scale_in_place(x, factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.transpose_scale_cast(x, scale=factors, out=out)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        factors.normal_()
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wanted = (x.float() * factors[:, None, None]).transpose(1, 2)
        assert torch.equal(out, wanted)


@needs_device
def test_more_than_two_to_the_31_elements():
    E, R, C = 3, 40_000, 20_032  # 2.4e9 elements
    x = torch.empty(E, R, C, device="cuda", dtype=torch.bfloat16)
    for expert in range(E):
        x[expert].normal_()
    factors = torch.tensor([1.0, 3.1, -0.7], device="cuda")
    out = kernels.transpose_scale_cast(x, scale=factors)
    for expert in range(E):
        for rows in (slice(0, 64), slice(R - 64, R)):
            wanted = (x[expert, rows].float() * factors[expert]).bfloat16()
            assert torch.equal(out[expert, :, rows], wanted.T)
