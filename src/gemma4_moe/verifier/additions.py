"""What an adapter adds to a tensor: the matrices of its module with their own bits, multiplied in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma4_moe.verifier.pieces import factors_of

if TYPE_CHECKING:
    from gemma4_moe.lora.modules import Array, LoraModule
    from gemma4_moe.verifier.arithmetic import Floats
    from gemma4_moe.verifier.assembled import Values


@dataclass(frozen=True, slots=True)
class Addition:
    """What an adapter adds to a tensor.

    Attributes:
        scale: The scale [E] that B is multiplied or divided by, or None.
        exchanged: Whether the source's tensor has the axes [E, in, out].
    """

    module: LoraModule
    scaling: float
    scale: Values | None = None
    divides: bool = False
    exchanged: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of its matrices while a tensor is compared."""
        return sum(2 * int(np.prod(side.shape)) * side.dtype.itemsize for side in self.module.sides.values())

    def read(self) -> Matrices:
        """Read its matrices."""
        a, b = (side if side.ndim == 3 else side[None] for side in (self.module.sides[s].read() for s in "AB"))
        factors = np.full(len(b), self.scaling)
        if self.scale is not None:
            scale = np.array(factors_of(self.scale))
            factors = factors / scale if self.divides else factors * scale
        return Matrices(a, b, factors, exchanged=self.exchanged)


class Matrices(NamedTuple):
    """The matrices A [E, r, in] and B [E, out, r] with their own bits, and the factor of each expert."""

    a: Array
    b: Array
    factors: Array
    exchanged: bool

    def acts(self, expert: int) -> bool:
        """Return whether the change of an expert is not zero."""
        return bool(self.a[expert].any() and self.b[expert].any())

    def product(self, expert: int, rows: slice, columns: slice) -> tuple[Floats, Floats]:
        """Return a part of an expert's change, with the axes of the source, and the sum of its terms' magnitudes."""
        own, other = (columns, rows) if self.exchanged else (rows, columns)
        b = self.b[expert, own].astype(np.float64) * self.factors[expert]
        a = self.a[expert, :, other].astype(np.float64)
        change, size = b @ a, np.abs(b) @ np.abs(a)
        return (change.T, size.T) if self.exchanged else (change, size)
