"""A plan cut into blocks: each one contiguous range to read, at most one kernel call, one contiguous range to write.

Experts lead in both layouts, so a run of experts is one range in the source and one in the target. What a run has to
write is a list of spans of the target's files, whose edges are pages. A block at a span's edge is made whole and
written in part, so that neither the size of blocks nor the number of ranks shows in the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.readers import PAGE, SLACK, whole_pages
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.table import Operation, transposes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.header import TensorEntry
    from gemma4_moe.converter.base import BaseExperts
    from gemma4_moe.converter.plan import Plan, PlannedTensor
    from gemma4_moe.layout.targets import Read

DEFAULT_MEMORY = 2**30

#: What a block holds at most, in bytes, unless one expert alone is larger.
BLOCK_BYTES = 32 * 2**20

#: Buffers on each side of the kernel: enough to keep reader, kernel and writer busy.
MOST_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes of a target file that one run has to write.

    Attributes:
        file: The file's bare name.
        start: The first byte, at the start of a page.
        end: The byte after the last: at the start of a page, or the file's end.
    """

    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [first, last) of one target tensor; a row is an expert, or one element where no axes are exchanged.

    Attributes:
        tensor: The tensor.
        entry: Where it lies in its file.
        file: The bare name of that file.
        first: The first row.
        last: The row after the last.
        span: What of the file is to be written; the block may reach beyond it.
    """

    tensor: PlannedTensor
    entry: TensorEntry
    file: str
    first: int
    last: int
    span: Span

    @property
    def is_copy(self) -> bool:
        """Whether the bytes go through unchanged."""
        source = self.tensor.source
        return self.tensor.operation is Operation.KEEP and source is not None and source.dtype == self.tensor.dtype

    @property
    def reads(self) -> tuple[Read[StoredTensor], ...]:
        """What is read for it, in order: nothing for a scale."""
        source = self.tensor.source
        return () if source is None else tuple(source.reads(self.first, self.last))

    @property
    def target_span(self) -> tuple[int, int]:
        """Offset in the target file and size, both in bytes."""
        offset, size = self._span(self.entry.nbytes)
        return self.entry.start + offset, size

    @property
    def written_range(self) -> tuple[int, int]:
        """What is written: the first byte of the target file, and the byte after the last."""
        start, size = self.target_span
        return max(start, self.span.start), min(start + size, self.span.end)

    def _span(self, nbytes: int) -> tuple[int, int]:
        row = nbytes // _rows(self.tensor)
        return self.first * row, (self.last - self.first) * row


@dataclass(frozen=True, slots=True)
class Memory:
    """The buffers of a conversion.

    Attributes:
        block_bytes: The most that a block of several rows holds on either side.
        buffer_bytes: Size of each buffer.
        buffers: How many buffers there are on each side of the kernel.
        base_bytes: Size of the buffer for an expert of the base; 0 without one.
    """

    block_bytes: int
    buffer_bytes: int
    buffers: int
    base_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Size of all buffers together."""
        return 2 * self.buffers * self.buffer_bytes + self.base_bytes


def plan_memory(plan: Plan, budget: int = DEFAULT_MEMORY) -> Memory:
    """Choose buffers that together stay within `budget` bytes.

    Raises:
        UsageError: One expert, before and after conversion, does not fit into the budget.
    """
    tensors = plan.tensors.values()
    base_bytes = max((_base_bytes(tensor.base) for tensor in tensors if tensor.base is not None), default=0)
    largest_row = max(_row_bytes(tensor) for tensor in tensors)
    room = budget - base_bytes
    block_bytes = max(largest_row, min(BLOCK_BYTES, room // (2 * MOST_BUFFERS) // PAGE * PAGE - SLACK))
    buffer_bytes = max(_buffer_bytes(tensor, _rows_in(tensor, block_bytes)) for tensor in tensors)
    if 2 * buffer_bytes > room:
        least = 2 * buffer_bytes + base_bytes
        widest = max(tensors, key=_row_bytes)
        raise UsageError(
            "the memory budget is smaller than one expert before and after conversion",
            tensor=widest.name,
            expected=f"at least {least} bytes",
            found=f"{budget} bytes",
            hint=f"allow --max-memory {math.ceil(least / 2**20)}MiB or more",
        )
    return Memory(block_bytes, buffer_bytes, min(MOST_BUFFERS, room // (2 * buffer_bytes)), base_bytes)


def blocks(plan: Plan, block_bytes: int, spans: Sequence[Span]) -> Iterator[Block]:
    """Yield every block that has bytes in one of `spans`, in the order of the spans and of their data."""
    files = {file.name: file for file in plan.files}
    for span in spans:
        for entry in files[span.file].entries:
            if entry.end <= span.start or entry.start >= span.end:
                continue
            tensor = plan.tensors[entry.name]
            rows, step = _rows(tensor), _rows_in(tensor, block_bytes)
            for first in range(0, rows, step):
                block = Block(tensor, entry, span.file, first, min(first + step, rows), span)
                start, end = block.written_range
                if start < end:
                    yield block


def _rows(tensor: PlannedTensor) -> int:
    if transposes(tensor.operation):
        return tensor.shape[0]
    return math.prod(tensor.shape) * tensor.dtype.bits // 8 // max(1, tensor.dtype.itemsize)


def _row_bytes(tensor: PlannedTensor) -> int:
    """Size of one row in bytes, on the side where it is larger."""
    elements = math.prod(tensor.shape[1:]) if transposes(tensor.operation) else 1
    sides = [tensor.dtype] if tensor.source is None else [tensor.dtype, tensor.source.dtype]
    return max(1, elements * max(dtype.itemsize for dtype in sides))


def _buffer_bytes(tensor: PlannedTensor, rows: int) -> int:
    """Size in bytes of a buffer that holds rows of a tensor on either side, each read of them in pages of its own."""
    source, size = tensor.source, whole_pages(rows * _row_bytes(tensor)) + SLACK
    if source is None or len(source.parts) == 1:
        return size
    return max(size, sum(whole_pages(read.end - read.start) + SLACK for read in source.reads(0, rows)))


def _base_bytes(base: BaseExperts) -> int:
    """Size of what an expert of a base is read into, in bytes."""
    return whole_pages(base.weights.nbytes // base.weights.shape[0]) + SLACK


def _rows_in(tensor: PlannedTensor, block_bytes: int) -> int:
    return max(1, min(_rows(tensor), block_bytes // _row_bytes(tensor)))
