"""The steps of a conversion for one block: read it, convert it, hash it, write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoint.hashing import blake3_of
from gemma4_moe.checkpoint.readers import PAGE
from gemma4_moe.converter.blocks import extent_of, room_for
from gemma4_moe.converter.overflows import can_overflow, count_overflows
from gemma4_moe.layout.table import Operation, transposes
from gemma4_moe.target.pieces import Piece, piece_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.readers import Reader
    from gemma4_moe.converter.blocks import Block
    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.unfold import Unfolding
    from gemma4_moe.layout import dtypes
    from gemma4_moe.layout.targets import Read
    from gemma4_moe.target.journal import Ledger
    from gemma4_moe.target.writers import PageWriter

Array = np.ndarray[Any, np.dtype[Any]]


class ConversionSteps:
    """Reads, converts, hashes and writes the blocks of one job. No step knows of another block.

    Attributes:
        written: The pieces of the blocks that were written.
    """

    def __init__(
        self,
        job: Job,
        readers: Mapping[str, Reader],
        writers: Mapping[str, PageWriter],
        ledger: Ledger,
        unfolding: Unfolding,
        given_back: Mapping[str, Array],
    ) -> None:
        """Take the means of the steps.

        Args:
            job: The job.
            readers: The source's files by name.
            writers: The target's files by name.
            ledger: Told of each piece that was written.
            unfolding: The base's experts.
            given_back: The scales [E] that are not all one, by the target's name.
        """
        self._scales = job.scales
        self._workers = job.workers
        self._readers = readers
        self._writers = writers
        self._ledger = ledger
        self._unfolding = unfolding
        self._given_back = given_back
        self.written: list[Piece] = []

    def read(self, block: Block, buffer: memoryview) -> list[memoryview]:
        """Read the bytes of each of the block's reads."""
        found = []
        for read in block.reads():
            reader, extent = self._readers[read.stored.file.path.name], extent_of(read)
            size = extent.end - extent.start
            found.append(reader.read(extent.start, size, buffer))
            buffer = buffer[room_for(size) :]
        return found

    def compute(self, block: Block, contents: list[memoryview], buffer: memoryview) -> dict[str, Any]:
        """Make the block's target bytes, as far behind a page as they are in the file, and return facts of it."""
        tensor = block.tensor
        into = _target(block, buffer)
        if tensor.source is None:
            scales = self._given_back.get(tensor.name)
            result = _array(into, tensor.dtype, (block.last - block.first,))
            result[...] = 1 if scales is None else scales[block.first : block.last]
            return {}
        scale = self._scales.get(tensor.name)
        factors = None if scale is None else scale[block.first : block.last]
        given = [*contents, *([] if factors is None else [factors.view(np.uint8).data])]
        facts: dict[str, Any] = {"tensor": tensor.name, "source": blake3_of(given)}
        for read, content in zip(block.reads(), contents, strict=True):
            if block.is_copy:
                np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(content, np.uint8))
            else:
                self._convert(block, read, content, into, factors, facts)
        return facts

    def _convert(
        self,
        block: Block,
        read: Read[StoredTensor],
        content: memoryview,
        into: memoryview,
        factors: Array | None,
        facts: dict[str, Any],
    ) -> None:
        """Convert what one read gave into its place in the block, and add its facts to `facts`."""
        tensor, rows = block.tensor, block.last - block.first
        own = slice(read.experts[0] - block.first, read.experts[1] - block.first)
        count = own.stop - own.start
        if tensor.operation is Operation.KEEP:
            result = _array(into, tensor.dtype, (rows,))[own]
            given = _array(content, read.stored.dtype, (count,))
            kernels.scale_cast(given, out=result, threads=self._workers)
        else:
            assert transposes(tensor.operation), "a scale has no source"
            result = _array(into, tensor.dtype, (rows, *tensor.shape[1:]))[own, :, slice(*read.rows)]
            experts = _array(content, read.stored.dtype, (count, result.shape[2], result.shape[1]))
            given = experts.swapaxes(1, 2)
            if tensor.base is not None:
                facts["given_back"] = self._unfolding.convert(tensor, read.experts[0], experts, result)
            else:
                scale = None if factors is None else factors[own].astype(np.float32)
                kernels.transpose_scale_cast(experts, scale=scale, out=result, threads=self._workers)
        if can_overflow(read.stored.dtype, tensor.dtype) and (number := count_overflows(given, result)):
            facts["overflowed"] = facts.get("overflowed", 0) + number

    def digest(self, block: Block, buffer: memoryview, facts: dict[str, Any]) -> Piece:
        """Return the block's piece of its file."""
        return piece_of(block.file, block.start, _target(block, buffer), **facts)

    def write(self, block: Block, buffer: memoryview, piece: Piece) -> None:
        """Write the block."""
        writer = self._writers[block.file]
        writer.write(block.start, _target(block, buffer))
        self._ledger.wrote(writer, piece)
        self.written.append(piece)


def _target(block: Block, buffer: memoryview) -> memoryview:
    """Return where in a buffer the block's target bytes are: as far behind a page as in the file."""
    begin = block.start % PAGE
    return buffer[begin : begin + block.end - block.start]


def _array(buffer: memoryview, dtype: dtypes.DType, shape: tuple[int, ...]) -> Array:
    """Return an array of the given shape over the start of a buffer."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(buffer, np.uint8, count).view(dtype.numpy()).reshape(shape)
