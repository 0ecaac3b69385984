"""A plan cut into blocks, the units that are read, converted, hashed, written, journalled and resumed.

A block is a run of rows of one target tensor. Its size follows from the shapes alone; the memory budget decides how
many blocks are in flight. Experts lead in both layouts, so the rows of a block are one range of its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.hashing import Extent
from gemma4_moe.checkpoint.readers import PAGE, SLACK, whole_pages
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.table import converted_shape

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.plan import Plan, PlannedTensor
    from gemma4_moe.layout.targets import Read

DEFAULT_MEMORY = 2**30

#: The most bytes of a block on its larger side, unless one row alone is larger. A multiple of a page.
BLOCK_BYTES = 32 * 2**20

#: Blocks that a load reads at a time. One thread reads the page cache at 6 GB/s, sixteen at 40 (an H100's host).
LOAD_BLOCKS = 8

#: Blocks that a load with shared reads receives at a time, besides those that it reads.
RECEIVED_BLOCKS = 4

#: Buffers on each side of the kernel: enough to keep reader, kernel and writer busy.
MOST_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class Block:
    """Rows (first, last) of one target tensor, and their bytes (start, end) in its file.

    A row is what the reads of its source count: an expert, a row of a matrix, or an element.
    """

    tensor: PlannedTensor
    file: str
    start: int
    end: int
    first: int
    last: int

    @property
    def place(self) -> tuple[str, int, int]:
        """The file, the first byte, and the byte after the last."""
        return self.file, self.start, self.end

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its rows: [n, R, C] of experts, [n, C] of a matrix, [n] of elements."""
        return self.last - self.first, *_row_of(self.tensor)

    def reads(self) -> list[Read[StoredTensor]]:
        """Return the reads that give the block's values, without the scale; none for a scale of ones."""
        source = self.tensor.source
        return [] if source is None else list(source.reads(self.first, self.last))

    def source_extents(self) -> list[Extent]:
        """Return all bytes of the source that decide the block's: its reads, and the scale of its experts."""
        extents = [extent_of(read) for read in self.reads()]
        if (scale := self.tensor.scale) is not None:
            start, size = scale.start, scale.dtype.itemsize
            extents.append(Extent(scale.file, start + self.first * size, start + self.last * size))
        return extents


def extent_of(read: Read[StoredTensor]) -> Extent:
    """Return the bytes of a read in their file."""
    start = read.stored.start
    return Extent(read.stored.file, start + read.start, start + read.end)


class Memory(NamedTuple):
    """The buffers of a conversion.

    Attributes:
        buffers: How many there are on each side of the kernel, each of `buffer_bytes`.
        base_bytes: The buffer for an expert of the base.
        change_bytes: Room for the matrices of the largest weights that an adapter changes.
    """

    buffer_bytes: int
    buffers: int
    base_bytes: int = 0
    change_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Size of all buffers together."""
        return 2 * self.buffers * self.buffer_bytes + self.base_bytes + self.change_bytes


def plan_memory(plan: Plan, budget: int = DEFAULT_MEMORY) -> Memory:
    """Return buffers that together stay within `budget` bytes; one block before and after conversion must fit."""
    base_bytes = max(
        (room_for(row_bytes(base.weights.nbytes, base.weights.shape)) for base in plan.bases.values()), default=0
    )
    largest = max(blocks(plan), key=_buffer_bytes)
    buffer_bytes = _buffer_bytes(largest)
    change_bytes = max((change.nbytes for change in plan.changes.values()), default=0)
    room = budget - base_bytes - change_bytes
    if 2 * buffer_bytes > room:
        least = 2 * buffer_bytes + base_bytes + change_bytes
        raise UsageError(
            "the memory budget is smaller than one block before and after conversion",
            tensor=largest.tensor.name,
            expected=f"at least {least} bytes",
            found=f"{budget} bytes",
            hint=f"allow --max-memory {ceil(least / 2**20)}MiB or more",
        )
    return Memory(buffer_bytes, min(MOST_BUFFERS, room // (2 * buffer_bytes)), base_bytes, change_bytes)


def room_for(nbytes: int) -> int:
    """Return the buffer that reading `nbytes` takes: the pages around them."""
    return whole_pages(nbytes) + SLACK


def row_bytes(nbytes: int, shape: Sequence[int]) -> int:
    """Return the size in bytes of one index of axis 0 of a tensor; of a scalar, all of it."""
    return nbytes // max(1, prod(shape[:1]))


def rows_at_once(nbytes: int) -> int:
    """Return how many rows of `nbytes` bytes make a block: at least one."""
    return max(1, BLOCK_BYTES // max(1, nbytes))


def load_block_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """Return the bytes of the largest block that a load reads; they follow from the file's dtypes alone."""
    sources = [tensor.source for tensor in tensors if tensor.source is not None]
    return max([BLOCK_BYTES, *(row_bytes(source.nbytes, source.shape) for source in sources)])


def blocks(plan: Plan) -> Iterator[Block]:
    """Yield every block of a plan, in the order of files and of their data. They cover each file behind its header."""
    for file in plan.files:
        for entry in file.entries:
            tensor = plan.tensors[entry.name]
            elements = prod(_row_of(tensor))
            count = entry.nbytes // max(1, elements * tensor.dtype.itemsize)
            itemsize = max(t.dtype.itemsize for t in (tensor, tensor.source) if t is not None)
            step = rows_at_once(elements * itemsize)
            row = entry.nbytes // max(1, count)
            for first in range(0, count, step):
                last = min(first + step, count)
                yield Block(tensor, file.name, entry.start + first * row, entry.start + last * row, first, last)


def _row_of(tensor: PlannedTensor) -> tuple[int, ...]:
    """Return the shape of a row of a target."""
    return () if tensor.source is None else converted_shape(tensor.operation, (1, *tensor.source.row))[1:]


def share(work: Iterable[Block], done: Container[tuple[str, int, int]], rank: int, world: int) -> list[Block]:
    """Return the blocks for rank `rank` of `world`; the shares together are all of `work` that is not in `done`.

    Blocks that touch one page of a file go to one rank: no two hosts write the same page.
    """
    missing = [block for block in work if block.place not in done]
    total = sum(block.end - block.start for block in missing)
    mine: list[Block] = []
    before = owner = 0
    page = ("", -1)  # the last one of the block before
    for block in missing:
        if page != (block.file, block.start // PAGE):
            owner = before * world // total
        if owner == rank:
            mine.append(block)
        before += block.end - block.start
        page = block.file, (block.end - 1) // PAGE
    return mine


def _buffer_bytes(block: Block) -> int:
    """Return the buffer that a block takes, on the side where it is larger."""
    return max(room_for(block.end - block.start), sum(room_for(read.end - read.start) for read in block.reads()))
