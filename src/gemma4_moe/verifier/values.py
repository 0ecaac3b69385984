"""The values of each tensor compared with those that are expected, bit by bit through bounded buffers."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.verifier.arithmetic import element_bits, reference, widen
from gemma4_moe.verifier.assembled import rows_of
from gemma4_moe.verifier.differences import Mismatches
from gemma4_moe.verifier.distances import Distances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.assembled import Values
    from gemma4_moe.verifier.differences import Difference
    from gemma4_moe.verifier.expected import Expectation

    #: Raises if the comparison is to end, because of an interrupt or a failure elsewhere.
    Check = Callable[[], None]

    #: A piece of a target: its place as in `Mismatches.compare`, the expected elements, and those that were found.
    Piece = tuple[tuple[int, int], Bits, Bits]

#: Rows and columns of an expert that are computed at once: a tile of both sides stays in the cache.
_TILE = 256

#: Bytes of both sides together that are read of an experts' tensor at once, unless one expert is larger.
_BLOCK_BYTES = 8 * 2**20

#: How many elements are compared at once if no axes are exchanged.
_PIECE = 2**16


class Pieces(Protocol):
    """Reads a tensor on both sides, as often as it is called."""

    def __call__(self, *, scan: bool) -> Iterator[Piece]:
        """Yield all pieces; `scan` looks for odd values of the source too."""


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
    for name, target in found.items():
        tensor = expected[name]
        source = tensor.source
        if may_refold(tensor, found) or (source is not None and name in with_experts):
            continue  # `refolded` compares both
        if source is None:
            if name not in with_experts:
                yield Comparison(partial(_compare_ones, target), target.nbytes)
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
    return not tensor.transposed and tensor.scale is not None and tensor.scale_name in found


def _compare_elements(odd: Oddities, source: Values, target: Values, memory: int, check: Check) -> list[Difference]:
    """Compare two tensors of one shape, the first cast to the dtype of the second."""

    def pieces(*, scan: bool) -> Iterator[Piece]:
        for first, one, two in _elements(source, target, memory, check):
            if scan:
                odd.scan(source.name, one.view(np.uint8), source.dtype)
            yield (first, 0), reference(one, source.dtype, target.dtype)[None], two[None]

    return _compare_pieces(target, pieces)


def _compare_experts(
    odd: Oddities, source: Values, target: Values, scale: Values | None, memory: int, check: Check
) -> list[Difference]:
    """Compare target [E, C, R] with source [E, R, C], each expert times its scale."""
    factors = [1.0] * target.shape[0] if scale is None else factors_of(scale)

    def pieces(*, scan: bool) -> Iterator[Piece]:
        for expert, old, new in experts_of(source, target, memory, check):
            if scan:
                scan_expert(odd, source, expert, old)
            for place, one, two in _tiles(expert, old, new, check):
                yield place, reference(one, source.dtype, target.dtype, factors[expert]), two

    return _compare_pieces(target, pieces)


def _compare_pieces(target: Values, pieces: Pieces) -> list[Difference]:
    """Compare all pieces of a target.

    Only a tensor that differs is measured: from its first difference on, and then from its start to there.
    """
    values, distances, equal = Mismatches(target.shape, target.dtype), Distances(target.dtype), 0
    for place, expected, found in pieces(scan=True):
        values.compare(expected, found, *place)
        if values.count:
            distances.add(expected, found)
        else:
            equal += 1
    if values.count:
        for _, expected, found in islice(pieces(scan=False), equal):
            distances.add(expected, found)
    return values.difference(target.name, distances)


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
        found, self._factors = read_whole(self._scale), factors_of(self._scale)
        expected = found.copy()
        for expert, old, new in experts_of(self._source, self._target, memory, check):
            scan_expert(odd, self._source, expert, old)
            if not self._judge(expert, old, new, check):
                expected[expert] = _ones(1, self._scale)[0]
        of_values, of_folds = Distances(self._target.dtype), Distances(self._source.dtype)
        if self._values.count or self._folds.count:
            for expert, old, new in experts_of(self._source, self._target, memory, check):
                for _, one, two in _tiles(expert, old, new, check):
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
            for place, one, two in _tiles(expert, old, new, check):
                fold.compare(*self._fold(expert, one, two), *place)
        if self._factors[expert] == 1 or fold.count:
            for place, one, two in _tiles(expert, old, new, check):
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
    return compare_scale(scale, _ones(scale.shape[0], scale), read_whole(scale))


def compare_scale(scale: Values, expected: Bits, found: Bits) -> list[Difference]:
    """Return the differences of a scale [E], from its bits as they are expected and as they are."""
    values, distances = Mismatches(scale.shape, scale.dtype), Distances(scale.dtype)
    values.compare(expected[None], found[None], 0)
    distances.add(expected, found)
    return values.difference(scale.name, distances)


def scan_expert(odd: Oddities, source: Values, expert: int, content: Bits) -> None:
    """Take in the values [R, C] of one expert, under the names of the tensors that store them."""
    for name, rows in rows_of(source, expert):
        odd.scan(name, content[rows].reshape(-1).view(np.uint8), source.dtype, (expert, expert + 1))


def _ones(count: int, scale: Values) -> Bits:
    return reference(np.ones(count, np.float32).view(np.uint32), FLOAT32, scale.dtype)


def factors_of(scale: Values) -> list[float]:
    """Return the values of a scale [E]."""
    values: list[float] = widen(read_whole(scale), scale.dtype).tolist()
    return values


def _elements(source: Values, target: Values, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
    """Yield pieces of two tensors after the number of their first element, both valid until the next step."""
    old_size, new_size = (element_bits(tensor.dtype).itemsize for tensor in (source, target))
    count = target.nbytes // new_size
    step = max(_PIECE, min(memory, _BLOCK_BYTES) // (old_size + new_size))
    buffers = np.empty(min(step, count) * old_size, np.uint8), np.empty(min(step, count) * new_size, np.uint8)
    for first in range(0, count, step):
        length = min(step, count - first)
        old = _read_into(buffers[0][: length * old_size], source, first * old_size)
        new = _read_into(buffers[1][: length * new_size], target, first * new_size)
        for begin in range(0, length, _PIECE):
            check()
            yield first + begin, old[begin : begin + _PIECE], new[begin : begin + _PIECE]


def experts_of(source: Values, target: Values, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
    """Yield each expert's number, its source [R, C] and its target [C, R], both valid until the next step."""
    count, columns, rows = target.shape
    old_bytes, new_bytes = source.nbytes // count, target.nbytes // count
    step = max(1, min(count, min(memory, _BLOCK_BYTES) // (old_bytes + new_bytes)))
    buffers = np.empty(step * old_bytes, np.uint8), np.empty(step * new_bytes, np.uint8)
    for first in range(0, count, step):
        check()
        experts = range(first, min(first + step, count))
        old = _read_into(buffers[0][: len(experts) * old_bytes], source, first * old_bytes)
        new = _read_into(buffers[1][: len(experts) * new_bytes], target, first * new_bytes)
        yield from zip(experts, old.reshape(-1, rows, columns), new.reshape(-1, columns, rows), strict=True)


def _tiles(expert: int, source: Bits, target: Bits, check: Check) -> Iterator[tuple[tuple[int, int], Bits, Bits]]:
    """Yield each tile [c, r] of source [R, C] and target [C, R], after its place in the flat target."""
    columns, rows = target.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            check()
            one = source[row : row + _TILE, column : column + _TILE].T
            two = target[column : column + _TILE, row : row + _TILE]
            yield ((expert * columns + column) * rows + row, rows), one, two


def read_whole(tensor: Values) -> Bits:
    """Return the elements of a whole tensor."""
    return _read_into(np.empty(tensor.nbytes, np.uint8), tensor, 0)


def _read_into(buffer: Bits, tensor: Values, start: int) -> Bits:
    """Fill a buffer with a tensor's bytes from byte `start` on, and return the buffer as elements."""
    tensor.read_into(memoryview(buffer.data), start)
    return buffer.view(element_bits(tensor.dtype))
