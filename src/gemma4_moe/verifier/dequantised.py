"""The verifier's own arithmetic of quantised weights: each element from its number and its scales, in fp64.

A number has at most four significant bits and a scale, rounded to fp32, 24: fp64 holds their product, so that it is
rounded to fp32 and then to the weight's dtype as the forms' libraries round it. A quotient of two fp32 numbers that is
rounded to fp64 and then to fp32 is the one rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.checkpoint.quantised.weights import Numbers
from gemma4_moe.layout.dtypes import FLOAT8_E4M3, FLOAT32
from gemma4_moe.verifier.arithmetic import element_bits, reference, widen

if TYPE_CHECKING:
    from gemma4_moe.checkpoint.quantised.weights import QuantisedWeight
    from gemma4_moe.checkpoint.readers import Readable
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.verifier.arithmetic import Bits, Floats

#: How many elements are computed at once: their fp64 products take 8 bytes each.
_PIECE = 2**15


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A quantised weight as a tensor whose bytes can be read."""

    weight: QuantisedWeight

    @property
    def name(self) -> str:
        """Its name in a checkpoint that is not quantised."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in elements."""
        return self.weight.shape

    @property
    def dtype(self) -> DType:
        """The dtype of its elements."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return self.weight.nbytes

    @property
    def file(self) -> Readable:
        """The file that has its numbers."""
        return self.weight.weight.file

    def read_into(self, destination: memoryview, offset: int = 0) -> None:
        """Fill `destination` with the bytes of elements from `offset` on. Raises what the files raise."""
        into = np.frombuffer(destination, np.uint8).view(element_bits(self.dtype))
        begin = offset // self.dtype.itemsize
        for first in range(0, into.size, _PIECE):
            piece = into[first : first + _PIECE]
            piece[...] = self._elements(begin + first, begin + first + piece.size)

    def _elements(self, first: int, last: int) -> Bits:
        """Return elements (first, last) of the flat weight."""
        *_, height, width = self.shape
        rows, columns = np.divmod(np.arange(first, last), width)
        matrices, rows = np.divmod(rows, height)
        grid, second = self.weight.grid, self.weight.second
        blocks = 0 if grid.shared else matrices * grid.rows
        places = (blocks + rows // grid.height) * grid.columns + columns // grid.width
        start = int(places.min())
        factors = _numbers(self.weight.scale, start, int(places.max()) + 1)[places - start]
        if second is not None:
            each = _numbers(second, 0, second.nbytes // second.dtype.itemsize)
            each = each[matrices] if each.size > 1 else each
            factors = _to_fp32(factors / each if self.weight.divides else factors * each)
        bits = self._bits(first, last)
        products = _to_fp32(self._values(bits) * factors).astype(np.float32)
        return reference(products.view(np.uint32), FLOAT32, self.dtype)

    def _bits(self, first: int, last: int) -> Bits:
        """Return the stored bits of the numbers of elements (first, last)."""
        per_byte = self.weight.numbers.per_byte
        begin = first // per_byte
        raw = np.empty(-(-last // per_byte) - begin, np.uint8)
        self.weight.weight.read_into(raw.data, begin)
        if per_byte == 1:
            return raw
        halves = np.empty(2 * raw.size, np.uint8)
        halves[0::2], halves[1::2] = raw % 16, raw // 16
        return halves[first - begin * per_byte :][: last - first]

    def _values(self, bits: Bits) -> Floats:
        """Return the numbers of stored bits; those of e2m1 are a sign, two bits of exponent and one of fraction."""
        if self.weight.numbers is Numbers.E4M3:
            return widen(bits, FLOAT8_E4M3)
        exponent, fraction = (bits >> 1 & 3).astype(np.float64), (bits & 1).astype(np.float64)
        magnitude = np.where(exponent == 0, fraction / 2, (1 + fraction / 2) * 2 ** (exponent - 1))
        signed = np.copysign(magnitude, np.where(bits & 8, -1.0, 1.0))
        return signed if self.weight.numbers is Numbers.E2M1 else signed + 0.0  # -0 + 0 is +0


def _numbers(tensor: StoredTensor, first: int, last: int) -> Floats:
    """Return elements (first, last) of a tensor."""
    size = tensor.dtype.itemsize
    raw = np.empty((last - first) * size, np.uint8)
    tensor.read_into(raw.data, first * size)
    return widen(raw.view(element_bits(tensor.dtype)), tensor.dtype)


def _to_fp32(values: Floats) -> Floats:
    """Return values rounded to fp32."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return values.astype(np.float32).astype(np.float64)
