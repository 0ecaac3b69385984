"""The values of quantised weights, number by number, against formulas in fp64 and the libraries' own functions."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.quantised.file import in_files, weight_of
from gemma4_moe.checkpoint.quantised.weights import Grid, Numbers, QuantisedWeight, grid_of, rectangles
from gemma4_moe.checkpoint.readers import SLACK, allocate
from gemma4_moe.checkpoint.stored import StoredTensor
from gemma4_moe.layout.dtypes import named
from gemma4_moe.verifier.dequantised import Dequantised
from support.quantised import by_transformers, expand

EVERY = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def opened(directory, numbers, scale, block=None, dtype="bfloat16", kind=Numbers.E4M3, second=None, divides=False):
    """A weight in a file, dequantised: as a tensor of this package, and as the verifier's."""
    parts = {"pad": torch.zeros(3, dtype=torch.uint8), "w": numbers, "s": scale}
    save_file(parts | ({} if second is None else {"t": second}), directory / "a.safetensors")
    file = SafetensorsFile(directory / "a.safetensors")
    stored = {entry.name: StoredTensor(entry.name, entry.dtype, entry.shape, entry.start, entry.end, file)
              for entry in file.header.entries}  # fmt: skip
    shape = (*numbers.shape[:-1], numbers.shape[-1] * kind.per_byte)
    groups = Grid(shape[-2], shape[-1] // 16, 1, 16)
    grid = grid_of(shape, tuple(scale.shape), block) if kind is Numbers.E4M3 else groups
    weight = QuantisedWeight(
        "w", shape, named(dtype), kind, stored["w"], stored["s"], grid, stored.get("t"), divides=divides
    )
    (tensor,) = in_files([weight]).values()
    assert weight_of(tensor) is weight
    return tensor, Dequantised(weight)


def read(tensor):
    raw = bytearray(tensor.nbytes)
    tensor.read_into(memoryview(raw))
    dtype = getattr(torch, tensor.dtype.name)
    return torch.frombuffer(raw, dtype=dtype).reshape(tensor.shape)


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_number_times_a_scale_is_the_fp32_product_rounded_once(dtype, tmp_path):
    numbers = EVERY.repeat(7, 1).reshape(7, 256)
    scale = torch.tensor([1.0, -0.37, 3e38, 1e-40, 2.0**-130, 700.1, 1.2345678])[:, None]
    ours, verifiers = opened(tmp_path, numbers, scale, dtype=dtype)
    expected = (numbers.float() * scale).to(getattr(torch, dtype))
    for found in (read(ours), read(verifiers)):
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        assert torch.equal(bits(found)[~nan], bits(expected)[~nan])  # -0 too
    assert torch.equal(bits(read(ours)), bits(read(verifiers)))  # a NaN's sign too


@pytest.mark.parametrize("shape", [(704, 2816), (192, 130), (5, 3), (2, 300, 257)], ids=str)
def test_the_last_block_may_be_a_part_of_one(shape, tmp_path):
    generator = torch.Generator().manual_seed(2)
    numbers = (torch.randn(shape, generator=generator) * 90).to(torch.float8_e4m3fn)
    grid = -(-shape[-2] // 128), -(-shape[-1] // 128)
    scale = torch.rand((*shape[:-2], *grid), generator=generator) + 0.05
    ours, verifiers = opened(tmp_path, numbers, scale, (128, 128))
    expected = (numbers.float() * expand(scale, shape, (128, 128))).bfloat16()
    assert torch.equal(read(ours), expected)
    assert torch.equal(read(verifiers), expected)


def test_equal_blocks_have_transformers_own_values(tmp_path):
    generator = torch.Generator().manual_seed(3)
    numbers = (torch.randn(3, 256, 384, generator=generator) * 90).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 3, generator=generator) + 0.05
    ours, _ = opened(tmp_path, numbers, scale, (128, 128))
    assert torch.equal(read(ours), by_transformers(numbers, scale))


@pytest.mark.parametrize("buffered", [True, False])
def test_any_run_of_elements_is_read_alone(buffered, tmp_path):
    generator = torch.Generator().manual_seed(4)
    numbers = (torch.randn(3, 41, 57, generator=generator) * 90).to(torch.float8_e4m3fn)
    ours, verifiers = opened(tmp_path, numbers, torch.rand(3, 6, 5, generator=generator) + 0.05, (8, 12))
    whole = np.frombuffer(read(ours).view(torch.int16).numpy().tobytes(), np.uint16)
    reader = ours.file.reader(buffered=buffered)
    random = np.random.default_rng(5)
    for _ in range(60):
        first, last = sorted(random.integers(0, whole.size + 1, 2))
        buffer = allocate(2 * int(last - first) + SLACK)
        piece = reader.read(ours.start + 2 * int(first), 2 * int(last - first), buffer)
        assert np.array_equal(np.frombuffer(piece, np.uint16), whole[first:last])
        raw = bytearray(2 * int(last - first))
        verifiers.read_into(memoryview(raw), 2 * int(first))
        assert np.array_equal(np.frombuffer(raw, np.uint16), whole[first:last])
    with pytest.raises(ValueError, match="not a run of elements"):
        ours.file.read_into(ours.start + 1, memoryview(bytearray(4)))
    reader.close()


@pytest.mark.parametrize("second", [(), (1,), (3,), (3, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", [Numbers.E2M1, Numbers.E2M1_UNSIGNED_ZERO])
@pytest.mark.parametrize("divides", [True, False])
def test_every_pair_of_e2m1_times_its_two_scales(kind, divides, second, tmp_path):
    generator = torch.Generator().manual_seed(6)
    packed = torch.arange(256, dtype=torch.uint8).repeat(3, 5, 1)
    scale = (torch.rand(3, 5, 32, generator=generator) * 300 - 20).to(torch.float8_e4m3fn)
    top = torch.rand(second, generator=generator) * 0.01 + 0.003
    ours, verifiers = opened(tmp_path, packed, scale, kind=kind, second=top, divides=divides)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat((table, -table if kind is Numbers.E2M1 else 0 - table))
    numbers = torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)
    each = top.reshape(-1, 1, 1).float()
    factors = (scale.float() / each if divides else scale.float() * each).double().repeat_interleave(16, -1)
    expected = (numbers * factors).float().bfloat16()
    for found in (read(ours), read(verifiers)):
        assert torch.equal(bits(found), bits(expected))  # -0 too
    for first in (1, 31, 511, 513, 2559):
        raw, other = bytearray(2 * 1001), bytearray(2 * 1001)
        ours.read_into(memoryview(raw), 2 * first)
        verifiers.read_into(memoryview(other), 2 * first)
        assert raw == other
        assert torch.equal(torch.frombuffer(raw, dtype=torch.int16), bits(expected).flatten()[first : first + 1001])


def test_rectangles_cover_a_run_in_order():
    for first in range(21):
        for last in range(first, 36):
            found = [row * 7 + column for top, bottom, left, right in rectangles(first, last, 7, 16)
                     for row in range(top, bottom) for column in range(left, right)]  # fmt: skip
            assert found == list(range(first, last))


@pytest.mark.parametrize(
    ("shape", "scale", "rows"),
    [
        ((6, 9), (), 1),
        ((6, 9), (1,), 1),
        ((6, 9), (6,), 6),
        ((6, 9), (6, 1), 6),
        ((6, 9), (2, 3), 2),
        ((5, 6, 9), (5,), 1),
        ((5, 6, 9), (5, 1, 1), 1),
        ((5, 6, 9), (5, 6), 6),
        ((5, 6, 9), (5, 6, 1), 6),
        ((5, 6, 9), (5, 2, 3), 2),
    ],
)
def test_the_shape_of_a_scale_tells_its_grid(shape, scale, rows):
    assert grid_of(shape, scale, (3, 4)).rows == rows


@pytest.mark.parametrize(("shape", "scale"), [((6, 9), (9,)), ((6, 9), (1, 9)), ((6, 9), (3, 2)), ((5, 6, 9), (6, 1)),
                                              ((6, 9), (0,)), ((5, 6, 9), (6, 2, 3))])  # fmt: skip
def test_no_other_shape_fits(shape, scale):
    assert grid_of(shape, scale, (3, 4)) is None
