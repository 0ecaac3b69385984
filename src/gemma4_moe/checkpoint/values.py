"""Odd values of tensors: NaN, infinities, experts that are all zero or equal to another, scales that mislead.

A scan takes the bytes of a tensor as they are read and hashed, piece by piece, while a piece is in a core's cache. It
samples each expert; experts with equal samples are then compared whole.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from gemma4_moe.checkpoint.hashing import Extent, hash_extents
from gemma4_moe.checkpoint.readers import SLACK, allocate
from gemma4_moe.layout.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32
from gemma4_moe.layout.names import fold_names, lookup
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType

    Array = np.ndarray[Any, np.dtype[Any]]

#: The bits of infinity. A NaN has larger ones; the sign is left out.
_INFINITY = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, FLOAT32: 0x7F800000, BY_NAME["float64"]: 0x7FF0 << 48}

#: Bytes that are looked at together.
_PIECE = 2**18

#: The first `_SAMPLE` of each `_SPACING` bytes of an expert are its sample.
_SAMPLE, _SPACING = 64, 4096


@dataclass(slots=True)
class Oddities:
    """The odd values of a set of tensors, by name. It is written in JSON as `document` has it.

    Attributes:
        nan: How many elements are NaN.
        infinite: How many elements are infinite.
        zero: The experts whose elements are all zero.
        equal: Groups of experts that are equal.
        samples: The digest of the sample of each expert that is not zero.
    """

    nan: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)
    zero: dict[str, list[int]] = field(default_factory=dict)
    equal: dict[str, list[list[int]]] = field(default_factory=dict)
    samples: dict[str, dict[int, str]] = field(default_factory=dict)

    def scan(
        self,
        name: str,
        content: memoryview | Array,
        dtype: DType,
        experts: tuple[int, int] | None = None,
        hash_piece: Callable[[Any], object] = memoryview,
    ) -> None:
        """Take in bytes of a tensor, those of `experts` (first, last) or of other elements, and hash each piece."""
        infinity = _INFINITY.get(dtype)
        if infinity is None or not content.nbytes:
            hash_piece(content)
            return
        first, last = experts or (0, 1)
        sign, step = 1 << dtype.bits - 1, _PIECE // dtype.itemsize
        whole = np.frombuffer(content, np.uint8).reshape(last - first, -1)
        unsigned, signed = (whole.view(f"{kind}{dtype.itemsize}") for kind in "ui")
        for number, own in enumerate(range(len(whole)), first):
            largest = 0
            for begin in range(0, unsigned.shape[1], step):
                piece = unsigned[own, begin : begin + step]
                hash_piece(piece.view(np.uint8).data)
                positive = int(np.maximum.reduce(signed[own, begin : begin + step]))
                bits = max(positive, 0, int(np.maximum.reduce(piece)) - sign)  # without the sign
                if bits >= infinity:
                    self._count(name, piece & piece.dtype.type(sign - 1), infinity)
                largest = max(largest, bits)
            if experts is not None and largest == 0:
                self.zero.setdefault(name, []).append(number)
            elif experts is not None:
                self.samples.setdefault(name, {})[number] = _sample(whole[own])

    def _count(self, name: str, bits: Array, infinity: int) -> None:
        for counts, mask in ((self.nan, bits > infinity), (self.infinite, bits == infinity)):
            if count := int(np.count_nonzero(mask)):
                counts[name] = counts.get(name, 0) + count

    def add(self, document: Mapping[str, Any]) -> None:
        """Add what `document` of another one has."""
        for counts, said in ((self.nan, document.get("nan", {})), (self.infinite, document.get("infinite", {}))):
            for name, count in said.items():
                counts[name] = counts.get(name, 0) + count
        for name, experts in document.get("zero", {}).items():
            self.zero[name] = sorted([*self.zero.get(name, []), *experts])
        for name, samples in document.get("samples", {}).items():
            self.samples.setdefault(name, {}).update({int(number): sample for number, sample in samples.items()})

    def document(self) -> dict[str, Any]:
        """Return the parts that are not empty, in JSON's types; the order of tensors is that of their names."""
        parts: dict[str, dict[str, Any]] = {
            "nan": self.nan,
            "infinite": self.infinite,
            "zero": self.zero,
            "equal": self.equal,
        }
        samples = {name: {str(n): sample for n, sample in found.items()} for name, found in self.samples.items()}
        return {key: dict(sorted(value.items())) for key, value in (parts | {"samples": samples}).items() if value}

    def compare(self, tensors: Mapping[str, StoredTensor], memory: int, *, buffered: bool = False) -> None:
        """Compare experts with equal samples whole, with at most `memory` bytes of buffers, and drop the samples."""
        pending = []
        for name, samples in self.samples.items():
            alike: dict[str, list[int]] = defaultdict(list)
            for number, sample in sorted(samples.items()):
                alike[sample].append(number)
            pending += [(name, number) for numbers in alike.values() if len(numbers) > 1 for number in numbers]
        self.samples = {}
        groups = [(_expert(tensors[name], number),) for name, number in pending]
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        digests = hash_extents(groups, memory, buffered=buffered) if groups else []
        for (name, number), digest in zip(pending, digests, strict=True):
            found[name, digest].append(number)
        for (name, _), numbers in found.items():
            if len(numbers) > 1:
                self.equal.setdefault(name, []).append(numbers)


def scan_checkpoint(checkpoint: Checkpoint, layout: Layout | None, memory: int) -> Oddities:
    """Return the odd values of all tensors of an open checkpoint, read with at most about `memory` bytes of buffers."""
    found = Oddities()
    buffer = allocate(memory)
    for tensor in checkpoint.tensors.values():
        name = None if layout is None else lookup(tensor.name, layout)
        own = None
        if name is not None and name.rule.is_matrices and tensor.nbytes and tensor.shape:
            own = name.part.experts(tensor.shape[0])
        row = max(1, tensor.dtype.itemsize) if own is None else tensor.nbytes // (own[1] - own[0])
        step = max(1, (memory - SLACK) // max(1, row))
        with closing(tensor.file.reader(buffered=True)) as reader:
            for first in range(0, tensor.nbytes // max(1, row), step):
                last = min(first + step, tensor.nbytes // row)
                piece = reader.read(tensor.start + first * row, (last - first) * row, buffer)
                experts = None if own is None else (own[0] + first, own[0] + last)
                found.scan(tensor.name, piece, tensor.dtype, experts)
    found.compare(checkpoint.tensors, memory, buffered=True)
    return found


def scales_of(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, Array]:
    """Return each `per_expert_scale` [E] of an open hf checkpoint by its name, with its own bits."""
    if layout is not Layout.HF:
        return {}
    named = ((tensor, lookup(tensor.name, layout)) for tensor in checkpoint.tensors.values())
    return {t.name: t.read() for t, name in named if name is not None and name.rule is SCALE}


def _expert(tensor: StoredTensor, number: int) -> Extent:
    size = tensor.nbytes // tensor.shape[0]
    return Extent(tensor.file, tensor.start + number * size, tensor.start + (number + 1) * size)


def _sample(own: Array) -> str:
    whole = len(own) // _SPACING * _SPACING
    lines = own[:whole].reshape(-1, _SPACING)[:, :_SAMPLE]
    return blake3(lines.tobytes() + own[whole:].tobytes()).hexdigest(length=8)


def is_document(said: Any) -> bool:
    """Return whether a part of a manifest is a `document` of `Oddities` as `convert` writes it, without samples."""
    forms: dict[str, Callable[[object], bool]] = {
        "nan": _is_number,
        "infinite": _is_number,
        "zero": _is_list,
        "equal": _is_list_of_lists,
    }
    if not isinstance(said, dict) or not forms.keys() >= said.keys():
        return False
    return all(isinstance(found, dict) and all(map(forms[key], found.values())) for key, found in said.items())


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_list_of_lists(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_list, value))


def value_notes(document: Mapping[str, Any], scales: Mapping[str, Array]) -> tuple[str, ...]:
    """Return sentences on odd scales [E], by name, and other odd values; folded over layers.

    `document` is that of `Oddities`.
    """
    notes = [*unusual_scales(scales)]
    for kind, key in (("NaN", "nan"), ("infinite", "infinite")):
        for group, names in fold_names(document.get(key, {})).items():
            count = sum(document[key][name] for name in names)
            notes.append(f"{group}: {count:,} {'value is' if count == 1 else 'values are'} {kind}{_tensors(names)}")
    for group, names in fold_names(document.get("zero", {})).items():
        experts = [number for name in names for number in document["zero"][name]]
        said = f"{len(experts)} {'expert is' if len(experts) == 1 else 'experts are'} all zero"
        notes.append(f"{group}: {said}, {_numbers(experts)}{_tensors(names)}")
    for group, names in fold_names(document.get("equal", {})).items():
        groups = [numbers for name in names for numbers in document["equal"][name]]
        count = sum(map(len, groups))
        notes.append(f"{group}: {count} experts are equal to another, {_numbers(groups[0])}{_tensors(names)}")
    return tuple(notes)


def _tensors(names: Iterable[str]) -> str:
    count = len(tuple(names))
    return f", in {count} tensors" if count > 1 else ""


def _numbers(numbers: Iterable[int]) -> str:
    shown = sorted(set(numbers))
    return ", ".join(map(str, shown[:8])) + (" and others" if len(shown) > 8 else "")


def unusual_scales(scales: Mapping[str, Array]) -> tuple[str, ...]:
    """Return which scales [E], by name, are zero, negative or not finite; folded over layers."""
    notes: list[str] = []
    kinds: dict[str, Callable[[Array], Array]] = {
        "NaN": np.isnan,
        "infinite": np.isinf,
        "zero": lambda scale: scale == 0,
        "negative": lambda scale: (scale < 0) & np.isfinite(scale),
    }
    counts: dict[str, dict[str, int]] = {}
    for name, stored in scales.items():
        scale = stored.astype(np.float32)
        counts[name] = {kind: n for kind, find in kinds.items() if (n := int(np.count_nonzero(find(scale))))}
    for group, names in fold_names(name for name, found in counts.items() if found).items():
        found = {kind: sum(counts[name].get(kind, 0) for name in names) for kind in kinds}
        said = " and ".join(f"{count} {kind}" for kind, count in found.items() if count)
        size = sum(scales[name].size for name in names)
        notes.append(f"{group}: per_expert_scale has {said} of {size} values, folded as they are")
    return tuple(notes)
