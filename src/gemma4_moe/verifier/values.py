"""The values of each tensor compared with those that are expected, bit by bit through bounded buffers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.verifier.arithmetic import reference
from gemma4_moe.verifier.differences import Mismatches
from gemma4_moe.verifier.distances import Distances
from gemma4_moe.verifier.merged import compare_merged
from gemma4_moe.verifier.pieces import compare_pieces, elements, experts, factors_of, read, scan_expert, tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference
    from gemma4_moe.verifier.expected import Expectation
    from gemma4_moe.verifier.pieces import Check, Piece


class Comparison(NamedTuple):
    """One comparison to make, of one tensor or of a few that belong together.

    Attributes:
        run: Makes it, with buffers of the given number of bytes, and calls the given function between short steps.
        nbytes: Size of the target's tensors in bytes.
        least: The least bytes of buffers with which it can be made.
    """

    run: Callable[[int, Check], list[Difference]]
    nbytes: int
    least: int = 0


def comparisons(
    expected: Mapping[str, Expectation], found: Mapping[str, Values], odd: Oddities
) -> Iterator[Comparison]:
    """Yield the comparisons of the values of `found`; what they read of the source is scanned into `odd`."""
    with_experts = {expected[name].scale_name for name in found}
    refolded = {expected[name].scale_name for name in found if may_refold(expected[name], found)}
    for name, target in found.items():
        tensor = expected[name]
        source = tensor.source
        if may_refold(tensor, found) or name in refolded:
            continue  # `refolds` yields the comparison of both
        if source is None:
            if name not in with_experts:
                yield Comparison(partial(_compare_ones, target), target.nbytes)
        elif tensor.addition is not None:
            one_expert = (source.nbytes + target.nbytes) // target.shape[0] if tensor.transposed else 0
            least = one_expert + tensor.addition.nbytes
            yield Comparison(partial(compare_merged, odd, target, tensor), target.nbytes, least)
        elif not tensor.transposed:
            yield Comparison(partial(_compare_elements, odd, source, target), target.nbytes)
        else:
            scale = None if tensor.scale_name is None else found.get(tensor.scale_name)
            one_expert = (source.nbytes + target.nbytes) // target.shape[0]
            if scale is None:
                yield Comparison(
                    partial(_compare_experts, odd, source, target, tensor.scale), target.nbytes, one_expert
                )
            else:
                nbytes = target.nbytes + scale.nbytes
                yield Comparison(partial(_Pair(source, target, scale).compare, odd), nbytes, one_expert)


def may_refold(tensor: Expectation, found: Mapping[str, Values]) -> bool:
    """Return whether experts in one layout on both sides may have another scale, if both fold to the same bits."""
    is_alone = tensor.addition is None and not tensor.transposed
    return is_alone and tensor.own_scale is not None and tensor.scale_name in found


def _compare_elements(odd: Oddities, source: Values, target: Values, memory: int, check: Check) -> list[Difference]:
    """Compare two tensors of one shape, the first cast to the dtype of the second."""

    def pieces(*, scan: bool) -> Iterator[Piece]:
        for first, one, two in elements(source, target, memory, check):
            if scan:
                odd.scan(source.name, one.view(np.uint8), source.dtype)
            yield (first, 0), reference(one, source.dtype, target.dtype)[None], two[None]

    return compare_pieces(target, pieces)


def _compare_experts(
    odd: Oddities, source: Values, target: Values, scale: Values | None, memory: int, check: Check
) -> list[Difference]:
    """Compare target [E, C, R] with source [E, R, C], each expert times its scale."""
    factors = [1.0] * target.shape[0] if scale is None else factors_of(scale)

    def pieces(*, scan: bool) -> Iterator[Piece]:
        for expert, old, new in experts(source, target, memory, check):
            if scan:
                scan_expert(odd, source, expert, old)
            for place, one, two, *_ in tiles(expert, old, new, check):
                yield place, reference(one, source.dtype, target.dtype, factors[expert]), two

    return compare_pieces(target, pieces)


class _Pair:
    """Compares target [E, H, I] and the target's scale [E], which should be ones, with source [E, I, H].

    If a scale is not one, both must fold to the source's bits. If they don't, but `down_proj` has these bits itself,
    the scale is the wrong one.
    """

    def __init__(self, source: Values, target: Values, scale: Values) -> None:
        self._source, self._target, self._scale = source, target, scale
        self._values = Mismatches(target.shape, target.dtype)
        self._folds = Mismatches(target.shape, source.dtype)
        self._folded: set[int] = set()  # the experts that are judged by their fold

    def compare(self, odd: Oddities, memory: int, check: Check) -> list[Difference]:
        """Make the comparison."""
        found, self._factors = read(self._scale), factors_of(self._scale)
        expected = found.copy()
        for expert, old, new in experts(self._source, self._target, memory, check):
            scan_expert(odd, self._source, expert, old)
            if not self._judge(expert, old, new, check):
                expected[expert] = _ones(1, self._scale)[0]
        of_values, of_folds = Distances(self._target.dtype), Distances(self._source.dtype)
        if self._values.count or self._folds.count:
            for expert, old, new in experts(self._source, self._target, memory, check):
                for _, one, two, *_ in tiles(expert, old, new, check):
                    if expert in self._folded:
                        of_folds.add(*self._fold(expert, one, two))
                    else:
                        of_values.add(*self._own(one, two))
        return [
            *self._values.difference(self._target.name, of_values),
            *self._folds.difference(self._target.name, of_folds, "fold"),
            *compare_scale(self._scale, expected, found),
        ]

    def _judge(self, expert: int, old: Bits, new: Bits, check: Check) -> bool:
        """Compare an expert, and return whether its scale is right."""
        fold, own = (
            Mismatches(self._target.shape, self._source.dtype),
            Mismatches(self._target.shape, self._target.dtype),
        )
        if self._factors[expert] != 1:
            for place, one, two, *_ in tiles(expert, old, new, check):
                fold.compare(*self._fold(expert, one, two), *place)
        if self._factors[expert] == 1 or fold.count:
            for place, one, two, *_ in tiles(expert, old, new, check):
                own.compare(*self._own(one, two), *place)
        if self._factors[expert] == 1:
            self._values.add(own)
        elif fold.count and not own.count:
            return False
        else:
            self._folds.add(fold)
            self._folded.add(expert)
        return True

    def _own(self, one: Bits, two: Bits) -> tuple[Bits, Bits]:
        """Return a tile as it is expected without its scale, and as it is."""
        return reference(one, self._source.dtype, self._target.dtype), two

    def _fold(self, expert: int, one: Bits, two: Bits) -> tuple[Bits, Bits]:
        """Return a tile of the source, and what the target's tile and scale fold to."""
        return one, reference(two, self._target.dtype, self._source.dtype, self._factors[expert])


def _compare_ones(scale: Values, _memory: int, _check: Check) -> list[Difference]:
    """Compare a scale [E] of the target with ones, if its experts can't be compared with it."""
    return compare_scale(scale, _ones(scale.shape[0], scale), read(scale))


def compare_scale(scale: Values, expected: Bits, found: Bits) -> list[Difference]:
    """Return the differences of a scale [E], from its bits as they are expected and as they are."""
    values, distances = Mismatches(scale.shape, scale.dtype), Distances(scale.dtype)
    values.compare(expected[None], found[None], 0)
    distances.add(expected, found)
    return values.difference(scale.name, distances)


def _ones(count: int, scale: Values) -> Bits:
    return reference(np.ones(count, np.float32).view(np.uint32), FLOAT32, scale.dtype)
