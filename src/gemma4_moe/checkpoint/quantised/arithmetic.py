"""The values of a quantised weight: its numbers times their scales, computed piece by piece."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from gemma4_moe.checkpoint.quantised.weights import Numbers, rectangles

if TYPE_CHECKING:
    from gemma4_moe.checkpoint.quantised.weights import QuantisedWeight
    from gemma4_moe.checkpoint.stored import StoredTensor

Array = np.ndarray[Any, np.dtype[Any]]

#: About how many elements are computed at once: their fp32 products stay in a processor's cache.
_PIECE = 2**16

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def _table(numbers: Numbers) -> Array:
    """Return the fp32 numbers that each byte has: [256, numbers a byte]."""
    every = np.arange(256, dtype=np.uint8)
    if numbers is Numbers.E4M3:
        e4m3: Array = every.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
        return e4m3
    signed = np.array([*_MAGNITUDES, *(-number for number in _MAGNITUDES)], np.float32)
    if numbers is Numbers.E2M1_UNSIGNED_ZERO:
        signed += 0.0  # -0 + 0 is +0
    return np.stack((signed[every & 15], signed[every >> 4]), axis=1)


def raw_range(weight: QuantisedWeight, first: int, last: int) -> tuple[int, int]:
    """Return the bytes (start, end) of the stored numbers that have elements (first, last)."""
    per_byte = weight.numbers.per_byte
    return first // per_byte, -(-last // per_byte)


def dequantise(weight: QuantisedWeight, first: int, buffer: memoryview) -> None:
    """Fill `buffer` with the elements from `first` on; the bytes of their numbers are at its end.

    An element is at least as long as its number, so that no number is written over before it is read.
    """
    own = np.frombuffer(buffer, np.uint8)
    elements = own.view(weight.dtype.numpy())
    begin, end = raw_range(weight, first, first + elements.size)
    raw = own[own.size - (end - begin) :]
    per_byte, table = weight.numbers.per_byte, _table(weight.numbers)
    columns = weight.shape[-1]
    for top, bottom, left, right in rectangles(first, first + elements.size, columns, _PIECE):
        start, stop = top * columns + left, (bottom - 1) * columns + right
        low, high = raw_range(weight, start, stop)
        numbers = np.take(table, raw[low - begin : high - begin], axis=0).reshape(-1)[start - low * per_byte :][
            : stop - start
        ]
        products = numbers.reshape(bottom - top, right - left)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            products *= _factors(weight, top, bottom, left, right)
            elements[start - first : stop - first] = products.reshape(-1).astype(elements.dtype)


def _factors(weight: QuantisedWeight, top: int, bottom: int, left: int, right: int) -> Array:
    """Return the fp32 factor of each element of a rectangle, of one shape with it or to be broadcast to it."""
    grid, height = weight.grid, weight.shape[-2]
    matrices, rows = np.divmod(np.arange(top, bottom), height)
    lines = rows // grid.height + (0 if grid.shared else grid.rows) * matrices
    first, last = int(lines[0]), int(lines[-1]) + 1
    scales: Array = _read(weight.scale, first * grid.columns, last * grid.columns)
    scales = scales.reshape(-1, grid.columns)[lines - first]
    if weight.second is not None:
        second = _read(weight.second)
        which = second[matrices, None] if second.size > 1 else second
        scales = scales / which if weight.divides else scales * which
    if grid.columns == 1:
        return scales
    begin, end = left // grid.width, -(-right // grid.width)
    scales = np.repeat(scales[:, begin:end], grid.width, axis=1)
    return scales[:, left - begin * grid.width : right - begin * grid.width]


def _read(tensor: StoredTensor, first: int = 0, last: int | None = None) -> Array:
    """Return elements (first, last) of a tensor as fp32; by default all of them."""
    size = tensor.dtype.itemsize
    end = tensor.nbytes if last is None else last * size
    raw = np.empty(end - first * size, np.uint8)
    tensor.read_into(raw.data, first * size)
    values: Array = raw.view(tensor.dtype.numpy()).astype(np.float32)
    return values
