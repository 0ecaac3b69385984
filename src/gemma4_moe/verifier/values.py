"""The values of each tensor compared with those that are expected, bit by bit through bounded buffers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.verifier.arithmetic import element_bits, reference, widen
from gemma4_moe.verifier.differences import Mismatches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.values import Oddities
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.differences import Difference
    from gemma4_moe.verifier.expected import Expectation

    #: Raises if the comparison is to end, because of an interrupt or a failure elsewhere.
    Check = Callable[[], None]

#: Rows and columns of an expert that are computed at once: a tile of both sides stays in the cache.
_TILE = 256

#: Bytes of both sides together that are read of an experts' tensor at once, unless one expert is larger.
_BLOCK_BYTES = 8 * 2**20

#: How many elements are compared at once if no axes are exchanged.
_PIECE = 2**16


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
    expected: Mapping[str, Expectation], found: Mapping[str, StoredTensor], odd: Oddities
) -> Iterator[Comparison]:
    """Yield the comparisons of the values of `found`; what they read of the source is scanned into `odd`."""
    with_experts = {expected[name].scale_name for name in found}
    for name, target in found.items():
        tensor = expected[name]
        source = tensor.source
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
                yield Comparison(partial(_compare_pair, odd, source, target, scale), nbytes, one_expert)


def _compare_elements(
    odd: Oddities, source: StoredTensor, target: StoredTensor, memory: int, check: Check
) -> list[Difference]:
    """Compare two tensors of one shape, the first cast to the dtype of the second."""
    values = Mismatches(target.shape, target.dtype)
    for first, one, two in _pieces(source, target, memory, check):
        odd.scan(source.name, one.view(np.uint8), source.dtype)
        values.compare(reference(one, source.dtype, target.dtype)[None], two[None], first)
    return values.difference(target.name)


def _compare_experts(
    odd: Oddities, source: StoredTensor, target: StoredTensor, scale: StoredTensor | None, memory: int, check: Check
) -> list[Difference]:
    """Compare target [E, C, R] with source [E, R, C], each expert times its scale."""
    factors = [1.0] * target.shape[0] if scale is None else _factors(scale)
    values = Mismatches(target.shape, target.dtype)
    for expert, old, new in _experts(source, target, memory, check):
        odd.scan(source.name, old.reshape(-1).view(np.uint8), source.dtype, (expert, expert + 1))
        for place, one, two in _tiles(expert, old, new, check):
            values.compare(reference(one, source.dtype, target.dtype, factors[expert]), two, *place)
    return values.difference(target.name)


def _compare_pair(
    odd: Oddities, source: StoredTensor, target: StoredTensor, scale: StoredTensor, memory: int, check: Check
) -> list[Difference]:
    """Compare target [E, H, I] and the target's scale [E], which should be ones, with source [E, I, H].

    If a scale is not one, both must fold to the source's bits. If they don't, but `down_proj` has these bits itself,
    the scale is the wrong one.
    """
    values, folds = Mismatches(target.shape, target.dtype), Mismatches(target.shape, source.dtype)
    scales, scale_bits = Mismatches(scale.shape, scale.dtype), _read(scale)
    factors = _factors(scale)
    for expert, old, new in _experts(source, target, memory, check):
        odd.scan(source.name, old.reshape(-1).view(np.uint8), source.dtype, (expert, expert + 1))
        fold, own = Mismatches(target.shape, source.dtype), Mismatches(target.shape, target.dtype)
        if factors[expert] != 1:
            for place, one, two in _tiles(expert, old, new, check):
                fold.compare(one, reference(two, target.dtype, source.dtype, factors[expert]), *place)
            if not fold.count:
                continue
        for place, one, two in _tiles(expert, old, new, check):
            own.compare(reference(one, source.dtype, target.dtype), two, *place)
        if factors[expert] == 1:
            values.add(own)
        elif own.count:
            folds.add(fold)
        else:
            scales.compare(_ones(1, scale), scale_bits[None, expert : expert + 1], expert)
    return [*values.difference(target.name), *folds.difference(target.name, "fold"), *scales.difference(scale.name)]


def _compare_ones(scale: StoredTensor, _memory: int, _check: Check) -> list[Difference]:
    """Compare a scale [E] of the target with ones, if its experts can't be compared with it."""
    values = Mismatches(scale.shape, scale.dtype)
    values.compare(_ones(scale.shape[0], scale), _read(scale)[None], 0)
    return values.difference(scale.name)


def _ones(count: int, scale: StoredTensor) -> Bits:
    return reference(np.ones((1, count), np.float32).view(np.uint32), FLOAT32, scale.dtype)


def _factors(scale: StoredTensor) -> list[float]:
    """Return the values of a scale [E]."""
    values: list[float] = widen(_read(scale), scale.dtype).tolist()
    return values


def _pieces(source: StoredTensor, target: StoredTensor, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
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


def _experts(source: StoredTensor, target: StoredTensor, memory: int, check: Check) -> Iterator[tuple[int, Bits, Bits]]:
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


def _read(tensor: StoredTensor) -> Bits:
    """Return the elements of a whole tensor."""
    return _read_into(np.empty(tensor.nbytes, np.uint8), tensor, 0)


def _read_into(buffer: Bits, tensor: StoredTensor, start: int) -> Bits:
    """Fill a buffer with a tensor's bytes from byte `start` on, and return the buffer as elements."""
    tensor.read_into(memoryview(buffer.data), start)
    return buffer.view(element_bits(tensor.dtype))
