"""The steps of a conversion for one block: read it, convert it, hash it, write it; and blocks in flight.

A few threads each take a block through all its steps, one thread at a time in each step. So the disk reads one block
while another is computed, a third is hashed and a fourth is written. No more blocks are in flight than there are
buffers. A failure in one thread, or an interrupt of the caller, stops the others at their next step.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from gemma4_moe import kernels
from gemma4_moe.checkpoint.readers import PAGE, allocate
from gemma4_moe.checkpoint.threads import run_in_threads
from gemma4_moe.checkpoint.values import Oddities
from gemma4_moe.converter.blocks import extent_of, room_for
from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.layout.table import converted_shape, transposes
from gemma4_moe.target.pieces import piece_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gemma4_moe.checkpoint.readers import Readable, Reader
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.base import FoldedScales, Unfolding
    from gemma4_moe.converter.blocks import Block, Memory
    from gemma4_moe.converter.merging import Merging
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.targets import Read
    from gemma4_moe.target.journal import Ledger
    from gemma4_moe.target.pieces import Piece
    from gemma4_moe.target.writers import PageWriter

Array = np.ndarray[Any, np.dtype[Any]]

#: How many elements are searched for infinities at once.
_PIECE = 2**20


@dataclass(slots=True)
class ConversionSteps:
    """Reads, converts, hashes and writes the blocks of one job. No step knows of another block.

    Both `scales` and `given_back` map a target's name to a scale [E]. `scales` are folded into their target;
    `given_back` are the values of scales that are written with a base, and a name that is missing there means ones.
    """

    scales: FoldedScales
    workers: int
    readers: Mapping[Readable, Reader]
    writers: Mapping[str, PageWriter]
    ledger: Ledger
    unfolding: Unfolding
    merging: Merging
    given_back: FoldedScales
    written: list[Piece] = field(default_factory=list)

    def read(self, block: Block, buffer: memoryview) -> list[memoryview]:
        """Read the bytes of each of the block's reads."""
        found = []
        for read in block.reads():
            reader, extent = self.readers[read.stored.file], extent_of(read)
            size = extent.end - extent.start
            found.append(reader.read(extent.start, size, buffer))
            buffer = buffer[room_for(size) :]
        return found

    def compute(self, block: Block, contents: list[memoryview], buffer: memoryview) -> dict[str, Any]:
        """Write the block's converted bytes into `buffer`, and return the facts to journal.

        They begin at their offset in the file modulo a page.
        """
        tensor = block.tensor
        into = _target(block, buffer)
        given = self.given_back.get(tensor.name)
        if tensor.source is None or given is not None:
            scales = _array(into, tensor.dtype, (block.last - block.first,))
            scales[...] = 1 if given is None else given[block.first : block.last]
            return {} if tensor.source is None else self._hash_and_scan(block, contents, None)
        scale = self.scales.get(tensor.name)
        factors = None if scale is None else scale[block.first : block.last].astype(np.float32)
        facts = self._hash_and_scan(block, contents, None if scale is None else scale[block.first : block.last])
        for read, content in zip(block.reads(), contents, strict=True):
            if not tensor.source.row and read.stored.dtype == tensor.dtype:
                np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(content, np.uint8))
                continue
            own = slice(read.experts[0] - block.first, read.experts[1] - block.first)
            result = _array(into, tensor.dtype, block.shape)[own]
            exchanges = transposes(tensor.operation)
            if len(block.shape) == 3:
                result = result[:, :, slice(*read.rows)] if exchanges else result[:, slice(*read.rows)]
            stored = _array(content, read.stored.dtype, converted_shape(tensor.operation, result.shape))
            values = stored.swapaxes(1, 2) if exchanges else stored
            own_factors = None if factors is None else factors[own]
            if tensor.name in self.unfolding.bases:
                facts["given_back"] = self._unfold(tensor.name, read.experts[0], stored, result)
            elif tensor.name in self.merging.changes:
                like_stored = result.swapaxes(1, 2) if exchanges else result
                self.merging.merge(tensor.name, read, stored, own_factors, like_stored)
            elif not exchanges and read.stored.dtype == tensor.dtype:
                _copy(stored, result)
            else:
                kernels.scale_cast(values, scale=own_factors, out=result, threads=self.workers)
            if self._can_overflow(block, read) and (number := count_overflows(values, result)):
                facts["overflowed"] = facts.get("overflowed", 0) + number
        return facts

    def _can_overflow(self, block: Block, read: Read[StoredTensor]) -> bool:
        """Return whether a finite value of a read can become infinite; with a change it has bfloat16's range."""
        dtypes = [read.stored.dtype, *([BFLOAT16] if block.tensor.name in self.merging.changes else [])]
        return any(can_overflow(dtype, block.tensor.dtype) for dtype in dtypes)

    def _hash_and_scan(self, block: Block, contents: list[memoryview], factors: Array | None) -> dict[str, Any]:
        """Return the hash of a block's source, and what is odd in its values."""
        hasher, oddities = blake3(), Oddities()
        for read, content in zip(block.reads(), contents, strict=True):
            experts = read.experts if block.tensor.source is not None and len(block.tensor.source.row) == 2 else None
            oddities.scan(read.stored.name, content, read.stored.dtype, experts, hasher.update)
        if factors is not None:
            hasher.update(factors.view(np.uint8).data)
        facts = {"tensor": block.tensor.name, "source": hasher.hexdigest()}
        odd = oddities.document()
        return facts | {"values": odd} if odd else facts

    def _unfold(self, name: str, first: int, experts: Array, result: Array) -> list[int]:
        """Write experts as the base's, or as they are, and return the numbers of those that are the base's."""
        given_back = []
        for number, (expert, into) in enumerate(zip(experts, result, strict=True), first):
            if self.unfolding.unfold(name, number, expert, into):
                given_back.append(number)
            elif name not in self.unfolding.own:
                kernels.transpose_scale_cast(expert, out=into, threads=self.workers)
            elif expert.dtype == into.dtype:
                _copy(expert, into)
            else:
                kernels.scale_cast(expert, out=into, threads=self.workers)
        return given_back

    def digest(self, block: Block, buffer: memoryview, facts: dict[str, Any]) -> Piece:
        """Return the block's piece of its file."""
        return piece_of(block.file, block.start, _target(block, buffer), **facts)

    def write(self, block: Block, buffer: memoryview, piece: Piece) -> None:
        """Write the block."""
        writer = self.writers[block.file]
        writer.write(block.start, _target(block, buffer))
        self.ledger.wrote(writer, piece)
        self.written.append(piece)


def run(blocks: Iterable[Block], steps: ConversionSteps, memory: Memory) -> None:
    """Take every block through its four steps; blocks are read in their order. Raises the first error of a step."""
    waiting = iter(blocks)
    reading, computing, hashing, writing = Lock(), Lock(), Lock(), Lock()

    def work(check: Callable[[], None]) -> None:
        @contextmanager
        def turn(step: Lock) -> Iterator[None]:
            with step:
                check()
                yield

        source, target = allocate(memory.buffer_bytes), allocate(memory.buffer_bytes)
        while True:
            with turn(reading):
                if (block := next(waiting, None)) is None:
                    return
                found = steps.read(block, source)
            with turn(computing):
                facts = steps.compute(block, found, target)
            with turn(hashing):
                piece = steps.digest(block, target, facts)
            with turn(writing):
                steps.write(block, target, piece)

    try:
        run_in_threads(memory.buffers, work)
    finally:
        with writing:  # an interrupt leaves threads alone; a write that has begun ends before its file is closed
            pass


def can_overflow(source: DType, target: DType) -> bool:
    """Return whether a finite value of `source` can become infinite in `target`."""
    old, new = source.float_format, target.float_format
    if old is None or new is None:
        return False
    return (old.max_exponent, old.precision) > (new.max_exponent, new.precision)


def count_overflows(source: Array, result: Array) -> int:
    """Return how many infinities of `result`, of two bytes each, have a finite element of `source` at their place."""
    infinity = np.array(np.inf, result.dtype).view(np.uint16) << 1  # without its sign
    rows = max(1, _PIECE // max(1, result[:1].size))
    count = 0
    for row in range(0, len(result), rows):
        infinite = result[row : row + rows].view(np.uint16) << 1 == infinity
        count += int(np.count_nonzero(np.isfinite(source[row : row + rows][infinite])))
    return count


def _target(block: Block, buffer: memoryview) -> memoryview:
    """Return where in a buffer the block's target bytes are: as far behind a page as in the file."""
    begin = block.start % PAGE
    return buffer[begin : begin + block.end - block.start]


def _copy(values: Array, out: Array) -> None:
    """Copy elements with their own bits."""
    np.copyto(out.view(np.uint8), values.view(np.uint8))


def _array(buffer: memoryview, dtype: DType, shape: tuple[int, ...]) -> Array:
    """Return an array of the given shape over the start of a buffer."""
    return np.frombuffer(buffer, np.uint8, prod(shape) * dtype.itemsize).view(dtype.numpy()).reshape(shape)
