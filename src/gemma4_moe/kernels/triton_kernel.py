"""The kernel in Triton, for CUDA tensors: one tile a program, converted in registers, both sides coalesced.

It loads and stores codes as integers, so that NaNs and plain copies keep the bits that they should have. Launches are
stream-ordered, read the scale on the device and never synchronise, so they may be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import prod

import torch
import triton
import triton.language as tl

from gemma4_moe.kernels.choice import interpreted

_Four = tuple[int, int, int, int]

#: The formats' numbers inside the kernel, and the integers of their size.
_FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CODES = {2: torch.int16, 4: torch.int32}

#: Rows (along the output's contiguous axis) and columns (along the input's) of a tile, and its warps: fewer where an
#: element of the input and one of the output take two bytes each. Measured on an H100; see docs/benchmarks.md.
_SIDE, _FEW_WARPS, _WARPS = 64, 8, 16

#: Triton asks for the interpreter once, too: when the kernel below is made.
_INTERPRETED = interpreted()

#: Elements of a tile where both sides are contiguous along the same axis, and its warps.
_ROW_ELEMENTS, _ROW_WARPS = 1024, 8


def scale_cast(x: torch.Tensor, factors: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write x [E, ...] to out, each x[e] times factors[e] (fp32), or as it is."""
    if x.numel() == 0:
        return
    if factors is None and x.dtype == out.dtype and x.stride() == out.stride():
        out.copy_(x)
        return
    if x.ndim > 4:
        for index in range(x.shape[1]):
            scale_cast(x.select(1, index), factors, out.select(1, index))
        return
    shape, x_stride, out_stride = _matrices(x, out, scaled=factors is not None)
    rows, columns, warps = _SIDE, _SIDE, _FEW_WARPS if x.itemsize == out.itemsize == 2 else _WARPS
    if out_stride[3] == 1:
        columns = min(_ROW_ELEMENTS, _power_of_2(shape[3]))
        rows, warps = min(_ROW_ELEMENTS // columns, _power_of_2(shape[2])), _ROW_WARPS
    tiles = prod(shape[:2]) * -(-shape[2] // rows) * -(-shape[3] // columns)  # triton.cdiv takes several us
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        _move[(tiles,)](
            x.view(_CODES[x.itemsize]),
            x if factors is None else factors,
            out.view(_CODES[out.itemsize]),
            *shape[1:],
            *x_stride,
            *out_stride,
            IN=_FORMATS[x.dtype],
            OUT=_FORMATS[out.dtype],
            SCALED=factors is not None,
            ROWS=rows,
            COLUMNS=columns,
            WHOLE=shape[2] % rows == 0 and shape[3] % columns == 0,
            WIDE=max(map(abs, (*x_stride[2:], *out_stride[2:]))) * max(rows, columns) >= 1 << 30,
            INTERPRETED=_INTERPRETED,
            num_warps=warps,
        )


def _matrices(x: torch.Tensor, out: torch.Tensor, *, scaled: bool) -> tuple[_Four, _Four, _Four]:
    """Return shape and strides of both as [E, B, R, C] such that x is contiguous along C if it is along R or C.

    In numbers alone: views would take as long as the launch, and small tensors are launched by the dozen.
    """
    front, missing = int(scaled), 4 - x.ndim
    shape = [*x.shape[:front], *[1] * missing, *x.shape[front:]]

    def padded(stride: tuple[int, ...]) -> list[int]:
        step = stride[front] * x.shape[front] if x.ndim > front else 1  # that of an axis of one element
        return [*stride[:front], *[step] * missing, *stride[front:]]

    x_stride, out_stride = padded(x.stride()), padded(out.stride())
    if x_stride[2] == 1 or (x_stride[3] != 1 and out_stride[2] != 1):
        for sizes in (shape, x_stride, out_stride):
            sizes[2:] = reversed(sizes[2:])
    if all(stride[3] == 1 and stride[2] == shape[3] for stride in (x_stride, out_stride)):
        whole = shape[2] * shape[3]
        shape[2:], x_stride[2:], out_stride[2:] = (1, whole), (whole, 1), (whole, 1)
    return tuple(shape), tuple(x_stride), tuple(out_stride)  # type: ignore[return-value]


def _power_of_2(size: int) -> int:
    """Return the least power of two that is no smaller; triton.next_power_of_2 takes several us."""
    return 1 << (size - 1).bit_length()


@triton.jit  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    x_ptr,
    factor_ptr,
    out_ptr,
    B,
    R,
    C,
    x_stride_e,
    x_stride_b,
    x_stride_r,
    x_stride_c,
    out_stride_e,
    out_stride_b,
    out_stride_r,
    out_stride_c,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_across = tl.cdiv(C, COLUMNS)
    tiles_down = tl.cdiv(R, ROWS)
    matrix = tile // (tiles_across * tiles_down)
    expert = (matrix // B).to(tl.int64)
    batch = (matrix % B).to(tl.int64)
    row = ((tile // tiles_across) % tiles_down).to(tl.int64) * ROWS
    column = (tile % tiles_across).to(tl.int64) * COLUMNS
    # The tile's origin in 64 bits, offsets within it in 32 wherever that is enough.
    x_ptr += expert * x_stride_e + batch * x_stride_b + row * x_stride_r + column * x_stride_c
    out_ptr += expert * out_stride_e + batch * out_stride_b + row * out_stride_r + column * out_stride_c
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    inside = None if WHOLE else (row + r < R) & (column + c < C)
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    codes = tl.load(x_ptr + (r * x_stride_r + c * x_stride_c), mask=inside)
    if SCALED:
        factor = tl.load(factor_ptr + expert)
        result = _encode(_decode(codes, IN) * factor, codes < 0, OUT, INTERPRETED)
        if IN == OUT:
            result = tl.where(factor == 1.0, codes, result)
    elif IN == OUT:
        result = codes
    else:
        result = _encode(_decode(codes, IN), codes < 0, OUT, INTERPRETED)
    tl.store(out_ptr + (r * out_stride_r + c * out_stride_c), result, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(codes, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    if FORMAT == 0:
        return (codes.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == 1:  # noqa: RET505  Triton compiles the branch that is taken, and only in this form
        return codes.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return codes.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _encode(value, negative, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if FORMAT == 0:
        if INTERPRETED:  # it cuts bits off where the device rounds
            word = value.to(tl.uint32, bitcast=True)
            code = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        else:
            code = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
        quiet = tl.where(negative, -0x40, 0x7FC0)
    elif FORMAT == 1:
        code = value.to(tl.float16).to(tl.int16, bitcast=True)
        quiet = tl.where(negative, -0x200, 0x7E00)
    else:
        code = value.to(tl.int32, bitcast=True)
        quiet = tl.where(negative, -0x400000, 0x7FC00000)
    return tl.where(value != value, quiet.to(code.dtype), code)
