"""Experts of the hf layout whose bits and scale may both be others, if they fold to the same native bits.

A conversion from hf to hf with a base writes an expert so: it gets the weights and the scale of the base, if these fold
to what the source folds to.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gemma4_moe.verifier.arithmetic import reference
from gemma4_moe.verifier.differences import Mismatches
from gemma4_moe.verifier.distances import Distances
from gemma4_moe.verifier.pieces import experts, factors_of, read, scan_expert
from gemma4_moe.verifier.values import Comparison, compare_scale, may_refold

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference
    from gemma4_moe.verifier.expected import Expectation
    from gemma4_moe.verifier.pieces import Check

#: Rows of an expert that are computed at once.
_ROWS = 64


def refolds(expected: Mapping[str, Expectation], found: Mapping[str, Values], odd: Oddities) -> Iterator[Comparison]:
    """Yield the comparisons of such experts and their scales; what they read of the source is scanned into `odd`."""
    for name, target in found.items():
        tensor = expected[name]
        if may_refold(tensor, found):
            assert tensor.source is not None
            assert tensor.own_scale is not None
            assert tensor.scale_name is not None
            scale = found[tensor.scale_name]
            least = (tensor.source.nbytes + target.nbytes) // target.shape[0]
            compare = _Refold(tensor.source, tensor.own_scale, target, scale).compare
            yield Comparison(partial(compare, odd), target.nbytes + scale.nbytes, least)


class _Refold:
    """Compares target [E, H, I] and its scale [E] with a source of the same layout."""

    def __init__(self, source: Values, source_scale: Values, target: Values, target_scale: Values) -> None:
        self._source, self._target = source, target
        self._source_scale, self._target_scale = source_scale, target_scale

    def compare(self, odd: Oddities, memory: int, check: Check) -> list[Difference]:
        """Make the comparison."""
        source, target = self._source, self._target
        self._before, self._after = factors_of(self._source_scale), factors_of(self._target_scale)
        found = read(self._target_scale)
        wanted = reference(read(self._source_scale), self._source_scale.dtype, self._target_scale.dtype)
        values, distances, wrong = Mismatches(target.shape, target.dtype), Distances(target.dtype), set()
        for expert, old, new in experts(source, target, memory, check):
            old = old.reshape(new.shape)  # both sides are [H, I] here
            scan_expert(odd, source, expert, old)
            own = self._own(expert, old, new)
            if own.count or wanted[expert] != found[expert]:
                if self._folds_alike(expert, old, new):
                    wanted[expert] = found[expert]
                elif own.count:
                    values.add(own)
                    wrong.add(expert)
        for expert, old, new in experts(source, target, memory, check) if wrong else ():
            if expert in wrong:
                distances.add(reference(old.reshape(new.shape), source.dtype, target.dtype), new)
        return [*values.difference(target.name, distances), *compare_scale(self._target_scale, wanted, found)]

    def _own(self, expert: int, old: Bits, new: Bits) -> Mismatches:
        """Compare the bits of an expert."""
        own = Mismatches(self._target.shape, self._target.dtype)
        for row in range(0, len(new), _ROWS):
            piece = slice(row, row + _ROWS)
            place = (expert * len(new) + row) * new.shape[1], new.shape[1]
            own.compare(reference(old[piece], self._source.dtype, self._target.dtype), new[piece], *place)
        return own

    def _folds_alike(self, expert: int, old: Bits, new: Bits) -> bool:
        """Return whether both sides of an expert fold to the same bits in the dtype of the source."""
        dtype = self._source.dtype
        for row in range(0, len(new), _ROWS):
            piece = slice(row, row + _ROWS)
            one = reference(old[piece], dtype, dtype, self._before[expert])
            two = reference(new[piece], self._target.dtype, dtype, self._after[expert])
            if (one != two).any():
                return False
        return True
