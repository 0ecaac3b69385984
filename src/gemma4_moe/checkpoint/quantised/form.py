"""The type of a quantised form: the names of a weight's tensors, and the rule for its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.quantised.weights import NVFP4_GROUP, Grid, Numbers, grid_of
from gemma4_moe.layout.dtypes import BFLOAT16, EXPERT_DTYPES, FLOAT8_E4M3, FLOAT32, DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_moe.checkpoint.stored import StoredTensor

_WEIGHT = "weight"


@dataclass(frozen=True, eq=False)
class Form:
    """One way in which a library stores quantised weights.

    A linear module `a` has its weight at `a.weight`. Some libraries have all experts in one tensor without a module of
    its own, such as `experts.gate_up_proj`, and join what belongs to it with "_".

    Attributes:
        name: Its name in messages, in notes and in docs/forms.md.
        library: The library that writes it: `quant_method` in its config.
        numbers: How the numbers are stored.
        weight: The last part of the weight's name in a linear module.
        scale: That of its scales.
        fused: The end of the name of a fused tensor's scales; None if the form has no fused tensors.
        second: The last part of the name of its second scales, or None.
        fused_second: The end of the name of a fused tensor's second scales.
        divides: Whether the second scale divides.
        beside: The last parts of names of scales that no weight needs: those of activations.
        own_dtype: Whether values have the dtype of the scales; otherwise they are bfloat16.
        in_blocks: Whether there may be a scale for each block of rows and columns.
        leaves: Returns whether a pattern of the config's list of modules that are not quantised matches a module.
    """

    name: str
    library: str
    numbers: Numbers
    scale: str
    leaves: Callable[[str, str], bool]
    weight: str = _WEIGHT
    fused: str | None = None
    second: str | None = None
    fused_second: str | None = None
    divides: bool = False
    beside: tuple[str, ...] = ()
    own_dtype: bool = False
    in_blocks: bool = False

    def names(self, weight: str) -> tuple[str, str | None] | None:
        """Return the names of a weight's scale and second scale, or None if this form has no weight of this name."""
        path, dot, last = weight.rpartition(".")
        if last == self.weight:
            return f"{path}{dot}{self.scale}", self.second and f"{path}{dot}{self.second}"
        if self.fused is None or last in (_WEIGHT, "weight_packed"):
            return None
        return weight + self.fused, self.fused_second and weight + self.fused_second

    def plain_name(self, weight: str) -> str:
        """Return a weight's name in a checkpoint that is not quantised."""
        path, dot, last = weight.rpartition(".")
        return f"{path}{dot}{_WEIGHT}" if last == self.weight else weight

    def stores(self, dtype: DType) -> bool:
        """Return whether numbers are stored in tensors of this dtype."""
        return dtype == FLOAT8_E4M3 if self.numbers is Numbers.E4M3 else dtype.name == "uint8"

    def takes(self, scale: StoredTensor) -> bool:
        """Return whether scales may have this one's dtype."""
        return scale.dtype in (EXPERT_DTYPES if self.numbers is Numbers.E4M3 else (FLOAT8_E4M3,))

    def dtype_of(self, scale: StoredTensor) -> DType:
        """Return the dtype of the values."""
        return scale.dtype if self.own_dtype else BFLOAT16

    def shape_of(self, weight: StoredTensor) -> tuple[int, ...]:
        """Return the shape of a weight in elements."""
        return (*weight.shape[:-1], weight.shape[-1] * self.numbers.per_byte)

    def grid(self, shape: tuple[int, ...], scale: StoredTensor, block: tuple[int, int]) -> Grid | None:
        """Return the grid of the scales of a weight of this shape, or None if they fit none."""
        if self.numbers is Numbers.E4M3:
            return grid_of(shape, scale.shape, block if self.in_blocks else None)
        groups = shape[-1] // NVFP4_GROUP
        fits = shape[-1] % NVFP4_GROUP == 0 and scale.shape == (*shape[:-1], groups)
        return Grid(shape[-2], groups, 1, NVFP4_GROUP) if fits else None

    def fits_second(self, shape: tuple[int, ...], second: StoredTensor) -> bool:
        """Return whether a second scale is one fp32 number, or one for each matrix."""
        one_each = {shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1)} if len(shape) > 2 else set()
        return second.dtype == FLOAT32 and second.shape in {(), (1,), *one_each}
