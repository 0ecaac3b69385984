"""Verify a converted checkpoint: compute every tensor of it again from its source, and compare bits.

Neither the kernels nor the plan of the conversion are used: what a tensor should be follows from `expectations` and
`reference`, so that no mistake of the converter can hide behind itself. Without a source, hashes are compared.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, overload

import numpy as np

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.recognition import check_tensors, recognise
from gemma4_moe.checkpoint.storage import open_regular, refusals, regular_status
from gemma4_moe.hub.source import locate
from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.manifest import Recheck, check_manifest
from gemma4_moe.target.recovery import check_published
from gemma4_moe.verifier.arithmetic import reference, widen
from gemma4_moe.verifier.comparison import (
    DEFAULT_MEMORY,
    Comparison,
    Verification,
    by_current_name,
    compare_all,
    elementwise,
    form_text,
    layout_of,
    present_in_one,
    read,
    read_into,
    summary,
)
from gemma4_moe.verifier.differences import Difference, Mismatches
from gemma4_moe.verifier.expected import common_dtype, compare_headers, expectations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.layout.names import MoEName
    from gemma4_moe.layout.table import Layout
    from gemma4_moe.sizes import Progress
    from gemma4_moe.verifier.arithmetic import Bits
    from gemma4_moe.verifier.expected import Expectation

#: Rows and columns of an expert that are computed at once: a tile of both sides stays in the cache.
_TILE = 256

#: Bytes of both sides together that are read of an experts' tensor at once, unless one expert is larger.
_BLOCK_BYTES = 8 * 2**20

#: Bytes that are read of a side file at once.
_CHUNK = 2**20


@overload
def verify(
    target: str | Path, /, *, revision: str | None = None, max_memory: int | str = ..., progress: Progress | None = ...
) -> Recheck: ...


@overload
def verify(
    source: str | Path,
    target: str | Path,
    /,
    *,
    revision: str | None = None,
    max_memory: int | str = ...,
    progress: Progress | None = ...,
) -> Verification: ...


def verify(
    first: str | Path,
    second: str | Path | None = None,
    /,
    *,
    revision: str | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Verification | Recheck:
    """Compare every tensor of a target with its source's, computed again; or a target alone with its manifest.

    `verify(source, target)` compares bit by bit, from hf to nemo and from nemo to hf; or in one layout, if a target
    differs from its source in spelling or in its files alone. Floating-point tensors may have been cast, all to one
    dtype. From nemo to hf an expert is right in two cases: `down_proj` has its bits and the scale is one, or both fold
    to its bits. Side files of the source must be in the target, byte for byte.

    `verify(target)` compares the hashes of every file with those in `gemma4_moe.json`.

    Args:
        first: The source, or the target if there is no second argument: a directory, or a Hub id.
        second: The target, likewise.
        revision: Branch, tag or commit of the first argument, if it is a Hub id.
        max_memory: The most bytes of buffers, or text such as "512MiB".
        progress: Called with the bytes that were compared so far and with their total.

    Returns:
        A `Verification` of a target with its source, a `Recheck` of a target alone.

    Raises:
        InputError: The source is not a checkpoint that can be converted, the target is not a checkpoint or has no
            manifest, or its publish was interrupted.
        StorageError: The disk or its permissions refused.
        SourceChangedError: A file changed while it was read.
        UsageError: The memory budget is too small or no size; or a directory was given a revision.
    """
    memory = parse_size(max_memory)
    source = locate(first, revision)
    if second is None:
        check_published(source)
        return check_manifest(source, max_memory=memory, progress=progress)
    target = locate(second)
    check_published(target)
    with open_checkpoint(source) as given, open_checkpoint(target) as judged:
        layout, names = _understand(given)
        to = layout_of(judged)
        expected = expectations(given, names, layout, to)
        found = by_current_name(judged, to)
        cast = None if layout is to else common_dtype(expected, found)
        forms = {name: form_text(tensor.dtype_text(cast), tensor.shape) for name, tensor in expected.items()}
        differences = list(present_in_one(forms, found))
        wrong, comparable = compare_headers(expected, found, cast)
        differences += wrong
        differences += compare_all(list(_comparisons(expected, comparable)), memory, progress)
        given.check_unchanged()
        judged.check_unchanged()
        differences += _compare_side_files(given, judged)
    return summary(source, target, len(expected.keys() | found.keys()), differences)


def _understand(source: Checkpoint) -> tuple[Layout, dict[str, MoEName | None]]:
    """Return the source's layout and the meaning of its names; refuse a source that can't be converted."""
    config = source.read_config()
    recognition = recognise(source.tensors, config)
    if recognition.refusal is not None:
        raise recognition.refusal
    assert recognition.layout is not None, "a checkpoint without a layout is refused"
    return recognition.layout, check_tensors(source.tensors.values(), recognition.layout, config)


def _comparisons(expected: Mapping[str, Expectation], found: Mapping[str, StoredTensor]) -> Iterator[Comparison]:
    """Yield the comparisons of the values of `found`."""
    with_experts = {expected[name].scale_name for name in found}
    for name, target in found.items():
        tensor = expected[name]
        if tensor.source is None:
            if name not in with_experts:
                yield Comparison(partial(_compare_ones, target), target.nbytes)
        elif not tensor.transposed:
            yield elementwise(tensor.source, target)
        else:
            scale = None if tensor.scale_name is None else found.get(tensor.scale_name)
            one_expert = (tensor.source.nbytes + target.nbytes) // target.shape[0]
            if scale is None:
                yield Comparison(
                    partial(_compare_experts, tensor.source, target, tensor.scale), target.nbytes, one_expert
                )
            else:
                nbytes = target.nbytes + scale.nbytes
                yield Comparison(partial(_compare_pair, tensor.source, target, scale), nbytes, one_expert)


def _compare_experts(
    source: StoredTensor, target: StoredTensor, scale: StoredTensor | None, memory: int
) -> list[Difference]:
    """Compare target [E, C, R] with source [E, R, C], each expert times its scale."""
    factors = [1.0] * target.shape[0] if scale is None else _factors(scale)
    values = Mismatches(target.shape, target.dtype)
    for expert, old, new in _experts(source, target, memory):
        for place, one, two in _tiles(expert, old, new):
            values.compare(reference(one, source.dtype, target.dtype, factors[expert]), two, *place)
    return values.difference(target.name)


def _compare_pair(source: StoredTensor, target: StoredTensor, scale: StoredTensor, memory: int) -> list[Difference]:
    """Compare target [E, H, I] and the target's scale [E], which should be ones, with source [E, I, H].

    If a scale is not one, both must fold to the source's bits. If they don't, but `down_proj` has these bits itself,
    the scale is the wrong one.
    """
    values, folds = Mismatches(target.shape, target.dtype), Mismatches(target.shape, source.dtype)
    scales, scale_bits = Mismatches(scale.shape, scale.dtype), read(scale, 0, scale.nbytes)
    factors = _factors(scale)
    for expert, old, new in _experts(source, target, memory):
        fold, own = Mismatches(target.shape, source.dtype), Mismatches(target.shape, target.dtype)
        if factors[expert] != 1:
            for place, one, two in _tiles(expert, old, new):
                fold.compare(one, reference(two, target.dtype, source.dtype, factors[expert]), *place)
            if not fold.count:
                continue
        for place, one, two in _tiles(expert, old, new):
            own.compare(reference(one, source.dtype, target.dtype), two, *place)
        if factors[expert] == 1:
            values.add(own)
        elif own.count:
            folds.add(fold)
        else:
            scales.compare(_ones(1, scale)[None], scale_bits[None, expert : expert + 1], expert)
    return [*values.difference(target.name), *folds.difference(target.name, "fold"), *scales.difference(scale.name)]


def _compare_ones(scale: StoredTensor, _memory: int) -> list[Difference]:
    """Compare a scale [E] of the target with ones, if its experts can't be compared with it."""
    values = Mismatches(scale.shape, scale.dtype)
    bits = read(scale, 0, scale.nbytes)
    values.compare(_ones(len(bits), scale)[None], bits[None], 0)
    return values.difference(scale.name)


def _ones(count: int, scale: StoredTensor) -> Bits:
    return reference(np.full(count, 0x3F800000, np.uint32), FLOAT32, scale.dtype)


def _factors(scale: StoredTensor) -> list[float]:
    """Return the values of a scale [E]."""
    values: list[float] = widen(read(scale, 0, scale.nbytes), scale.dtype).tolist()
    return values


def _experts(source: StoredTensor, target: StoredTensor, memory: int) -> Iterator[tuple[int, Bits, Bits]]:
    """Yield each expert's number, its source [R, C] and its target [C, R], both valid until the next step."""
    count, columns, rows = target.shape
    old_bytes, new_bytes = source.nbytes // count, target.nbytes // count
    step = max(1, min(count, min(memory, _BLOCK_BYTES) // (old_bytes + new_bytes)))
    buffers = np.empty(step * old_bytes, np.uint8), np.empty(step * new_bytes, np.uint8)
    for first in range(0, count, step):
        experts = range(first, min(first + step, count))
        old = read_into(buffers[0][: len(experts) * old_bytes], source, first * old_bytes)
        new = read_into(buffers[1][: len(experts) * new_bytes], target, first * new_bytes)
        yield from zip(experts, old.reshape(-1, rows, columns), new.reshape(-1, columns, rows), strict=True)


def _tiles(expert: int, source: Bits, target: Bits) -> Iterator[tuple[tuple[int, int], Bits, Bits]]:
    """Yield each tile [c, r] of source [R, C] and target [C, R], after its place in the flat target."""
    columns, rows = target.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            one = source[row : row + _TILE, column : column + _TILE].T
            two = target[column : column + _TILE, row : row + _TILE]
            yield ((expert * columns + column) * rows + row, rows), one, two


def _compare_side_files(source: Checkpoint, target: Checkpoint) -> Iterator[Difference]:
    """Yield the source's side files that the target lacks, or holds with other bytes."""
    there = {path.name: path for path in target.side_files}
    for path in source.side_files:
        expected = f"{regular_status(path).st_size} bytes, as in the source"
        if path.name not in there:
            yield Difference(path.name, "file", expected, None)
            continue
        position = _first_other_byte(path, there[path.name])
        if position is not None:
            size = regular_status(there[path.name]).st_size
            found = f"{size} bytes, the first that differs at {position}"
            yield Difference(path.name, "file", expected, found)


def _first_other_byte(one: Path, other: Path) -> int | None:
    """Return the position of the first byte that differs in two files, or None."""
    position = 0
    with (
        os.fdopen(open_regular(one), "rb") as left,
        os.fdopen(open_regular(other), "rb") as right,
        refusals("read the file", other),
    ):
        while True:
            a, b = left.read(_CHUNK), right.read(_CHUNK)
            if a != b:
                differing = (at for at, (old, new) in enumerate(zip(a, b, strict=False)) if old != new)
                return position + next(differing, min(len(a), len(b)))
            if not a:
                return None
            position += len(a)
