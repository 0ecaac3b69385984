"""The tensors that a set of tensors becomes in a layout: name, shape, dtype, operation and sources of each.

The converter, `plan`, loading, saving and the stream all ask `targets_of`; `inspect` and the adapter check with the
same `Inventory`. Names, shapes and dtypes decide, never values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from gemma4_moe.errors import InputError
from gemma4_moe.layout.dtypes import DType, cast_to
from gemma4_moe.layout.names import LayerKey, MoEName, natural_key
from gemma4_moe.layout.spellings import CURRENT, WHOLE, Part, Spelling
from gemma4_moe.layout.table import Layout, Operation, Rule, converted_shape, shape_of, transposes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gemma4_moe.layout.inventory import Inventory


class Described(Protocol):
    """A tensor without its values."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""

    @property
    def dtype(self) -> DType:
        """Its dtype."""


T = TypeVar("T", bound=Described)


@dataclass(frozen=True, slots=True)
class Read(Generic[T]):
    """A range of one stored tensor, and the place of its values in the role's tensor [E, R, C].

    Attributes:
        start: The first byte, counted from the tensor's own start.
        end: The byte after the last.
        experts: The experts (start, end) that it holds; elements if no axes are exchanged.
        rows: The rows (start, end) of each.
    """

    stored: T
    start: int
    end: int
    experts: tuple[int, int]
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """The values that a target is made from: one stored tensor, or several if a spelling stores a role so.

    Attributes:
        dtype: The dtype of all its tensors.
        shape: The shape of the whole.
        parts: The whole of each tensor, in the order of experts, then of rows.
        row: The shape of one of those that its reads count: an expert's matrix, a row of a matrix, or an element.
    """

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[Read[T], ...]
    row: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return _nbytes(self)

    def by_rows(self) -> Source[T]:
        """Return a source of elements [R, C] as one whose reads count rows."""
        (whole,) = self.parts
        return replace(self, parts=(replace(whole, experts=(0, self.shape[0])),), row=self.shape[1:])

    def reads(self, first: int, last: int) -> Iterator[Read[T]]:
        """Yield the reads of the experts, or rows, or elements, (first, last), in the order of the parts."""
        begin = bisect_right(self.parts, first, key=lambda part: part.experts[1])
        for part in self.parts[begin:]:
            start, end = max(first, part.experts[0]), min(last, part.experts[1])
            if start >= end:
                break
            size = part.end // (part.experts[1] - part.experts[0])
            before = start - part.experts[0]
            yield Read(part.stored, before * size, (before + end - start) * size, (start, end), part.rows)


@dataclass(frozen=True, slots=True, repr=False)
class Target(Generic[T]):
    """One tensor of the other layout.

    Attributes:
        operation: The operation that makes it from `source`.
        role: The name of its role's whole tensor, current spelling; its own name if both layouts have it.
        source: The values that it is made from; None for a scale of ones.
        scale: The tensor [E] whose values multiply its experts, or None.
        part: Its share of its role's tensor.
        beside: For a scale of ones, the tensor of its experts.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    operation: Operation
    role: str
    source: Source[T] | None
    scale: T | None = None
    part: Part = WHOLE
    beside: T | None = None

    def __repr__(self) -> str:
        return f"<Target {self.name}: {self.dtype.name} {list(self.shape)}, {self.operation}>"

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return _nbytes(self)

    @property
    def stored(self) -> tuple[T, ...]:
        """The stored tensors that it is made from, its scale last."""
        parts = () if self.source is None else tuple(part.stored for part in self.source.parts)
        return parts if self.scale is None else (*parts, self.scale)

    @property
    def origin(self) -> T:
        """The first stored tensor that it is made from, or that the experts of a scale of ones are made from."""
        origin = self.beside if self.source is None else self.source.parts[0].stored
        assert origin is not None, "a scale of ones belongs to experts"
        return origin


def problems(tensors: Iterable[Described], inventory: Inventory, required: Sequence[Rule]) -> Iterator[InputError]:
    """Take tensors into an inventory, and yield the error of each, then that of the first incomplete layer."""
    for tensor in tensors:
        try:
            inventory.add(tensor.name, tensor.shape, tensor.dtype.name)
        except InputError as error:
            yield error
    try:
        inventory.require_complete(required)
    except InputError as error:
        yield error


def targets_of(
    tensors: Iterable[T],
    inventory: Inventory,
    required: Sequence[Rule],
    cast: DType | None = None,
    spelling: Spelling = CURRENT,
    to: Layout | None = None,
) -> dict[str, Target[T]]:
    """Return every tensor that these become in a layout, by name, in the natural order of their roles.

    Args:
        tensors: All tensors of one layout. A target refers to these objects, whatever their type.
        inventory: An empty one of their layout, which then holds them.
        required: The rows that each layer must have.
        cast: The dtype of every floating-point tensor; None to keep each one's own.
        spelling: The form in which hf tensors are written.
        to: The layout of the targets: the other one by default. In the tensors' own layout every value is kept.

    Raises:
        UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
        IncompleteExpertsError: See `Inventory.require_complete`.
    """
    given, to = list(tensors), to or inventory.layout.other
    for problem in problems(given, inventory, required):
        raise problem
    by_name = {tensor.name: tensor for tensor in given}
    made: list[Target[T]] = []
    for name, parsed in inventory.names.items():
        if parsed is None:
            whole = _elements(by_name[name])
            made.append(Target(name, cast_to(whole.dtype, cast), whole.shape, Operation.KEEP, name, whole))
    for key, rows in inventory.layers.items():
        for rule, parts in rows.items():
            stored = {part: by_name[name] for part, (name, _) in parts.items()}
            source = _source(rule, stored, inventory, key)
            factor = rule.factor if (inventory.layout, to) == (Layout.HF, Layout.NEMO) else None
            scale = None if factor is None else by_name[rows[factor][WHOLE][0]]
            for row in (rule,) if to is inventory.layout else rule.yields(to):
                operation = Operation.KEEP if to is inventory.layout else row.operation
                made += _made(MoEName(*key, row), operation, source, scale, to, cast, spelling)
    _check_used_once(by_name, made)
    return {target.name: target for target in sorted(made, key=lambda target: natural_key(target.role))}


def hf_tensors(parsed: MoEName | None, name: str) -> list[tuple[str, Operation]]:
    """Return (hf name, operation) of each hf tensor, current spelling, that the native tensor `name` becomes."""
    if parsed is None:
        return [(name, Operation.KEEP)]
    return [(parsed.sibling(rule).hf, rule.operation) for rule in parsed.rule.yields(Layout.HF)]


def _made(
    name: MoEName,
    operation: Operation,
    source: Source[T],
    scale: T | None,
    to: Layout,
    cast: DType | None,
    spelling: Spelling,
) -> Iterator[Target[T]]:
    """Yield the targets of one row in layout `to` that are made from `source`."""
    dtype, role = cast_to(source.dtype, cast), name.name(to)
    shape = converted_shape(operation, source.shape)
    if to is Layout.NEMO:
        yield Target(role, dtype, shape, operation, role, source, scale)
        return
    for rest, part in spelling.parts(name.rule, next(iter(shape), 1)):
        written = name.layer_path + rest
        if operation is Operation.FOLD:
            yield Target(written, dtype, shape[:1], operation, role, None, beside=source.parts[0].stored)
        else:
            yield Target(written, dtype, part.shape(shape), operation, role, source, part=part)


def _source(rule: Rule, stored: dict[Part, T], inventory: Inventory, key: LayerKey) -> Source[T]:
    """Return the stored tensors of one role of a layer as one source."""
    if not transposes(rule.operation):
        return _elements(stored[WHOLE])
    shape = shape_of(rule, inventory.layout, inventory.sizes(key[0]))
    ordered = sorted(stored.items(), key=lambda item: (item[0].expert or 0, item[0].slot))
    reads = (Read(t, 0, _nbytes(t), part.experts(shape[0]), part.rows(shape[1])) for part, t in ordered)
    return Source(ordered[0][1].dtype, shape, tuple(reads), row=shape[1:])


def _elements(tensor: T) -> Source[T]:
    """Return one tensor as a source of elements; those of a packed dtype are its bytes."""
    nbytes = _nbytes(tensor)
    elements = nbytes // max(1, tensor.dtype.itemsize)
    return Source(tensor.dtype, tensor.shape, (Read(tensor, 0, nbytes, (0, elements), (0, 1)),))


def _nbytes(tensor: Described | Source[T]) -> int:
    return prod(tensor.shape) * tensor.dtype.bits // 8


def _check_used_once(tensors: Iterable[str], made: Iterable[Target[T]]) -> None:
    """Check the planner's own work: no tensor is dropped, none is used twice, no name is made twice."""
    first = (target for target in made if (target.part.expert or 0, target.part.slot) == (0, 0))
    used = Counter(tensor.name for target in first for tensor in target.stored)
    names = Counter(target.name for target in made)
    wrong = {name: used[name] for name in {*tensors, *used} if used[name] != 1}
    twice = [name for name, count in names.items() if count != 1]
    if wrong or twice:
        raise AssertionError(f"tensors not used exactly once: {wrong}; made twice: {twice}")
