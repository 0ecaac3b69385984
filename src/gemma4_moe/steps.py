"""What the threads of a conversion do with a block: read it, convert it, hash it, write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe import dtypes, kernels
from gemma4_moe.checkpoints.direct_io import PAGE
from gemma4_moe.checkpoints.hashing import ChunkHasher
from gemma4_moe.layouts import Operation
from gemma4_moe.transforms import transposes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.blocks import Block
    from gemma4_moe.checkpoints.direct_io import PageWriter, Reader
    from gemma4_moe.checkpoints.hashing import Chunk
    from gemma4_moe.ledger import Ledger
    from gemma4_moe.planning import Plan
    from gemma4_moe.scales import Scales

Array = np.ndarray[Any, np.dtype[Any]]


class ConversionSteps:
    """Reads, converts, hashes and writes the blocks of one plan."""

    def __init__(
        self,
        plan: Plan,
        scales: Scales,
        readers: Mapping[str, Reader],
        writers: Mapping[str, PageWriter],
        ledger: Ledger,
        workers: int | None,
    ) -> None:
        """Take what the steps work with.

        Args:
            plan: What is converted.
            scales: The scales that are folded, by the target tensor's name.
            readers: The source's files by name.
            writers: The target's files by name.
            ledger: Told of what was read and written.
            workers: Threads of the kernel.
        """
        self._scales = scales
        self._readers = readers
        self._writers = writers
        self._ledger = ledger
        self._workers = workers
        self._headers = {file.name: memoryview(file.header) for file in plan.files}
        self._sizes = {file.name: file.size for file in plan.files}
        self._source_hasher = ChunkHasher("", 0)
        self._source_name = ""
        self._target_hasher = ChunkHasher("", 0)
        self._target_name = ""

    def read(self, block: Block, buffer: memoryview) -> memoryview:
        """Read the block's source bytes, with the pages around them."""
        source = block.tensor.source
        if source is None:
            return buffer[:0]
        offset, size = block.source_span
        return self._readers[source.file.path.name].read(source.entry.start + offset, size, buffer)

    def compute(self, block: Block, source: memoryview, buffer: memoryview) -> None:
        """Make the block's target bytes, as far behind a page as they are in the file."""
        self._hash_source(block, source)
        tensor = block.tensor
        rows = block.last - block.first
        offset, size = block.target_span
        into = buffer[offset % PAGE : offset % PAGE + size]
        if block.is_copy:
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
            return
        result = _array(into, tensor.dtype, (rows, *tensor.shape[1:]) if transposes(tensor.operation) else (rows,))
        if tensor.source is None:
            result[...] = 1
        elif tensor.operation is Operation.KEEP:
            kernels.scale_cast(_array(source, tensor.source.dtype, (rows,)), out=result, threads=self._workers)
        else:
            scale = self._scales.get(tensor.name)
            kernels.transpose_scale_cast(
                _array(source, tensor.source.dtype, (rows, *tensor.source.shape[1:])),
                scale=None if scale is None else scale[block.first : block.last],
                out=result,
                threads=self._workers,
            )

    def digest(self, block: Block, buffer: memoryview) -> dict[Chunk, str]:
        """Return the hash of each chunk of the target's file that the block completes."""
        file, (start, end) = block.file, block.written_range
        if file != self._target_name:
            self._target_name = file
            self._target_hasher = ChunkHasher(file, self._sizes[file])
        found: dict[Chunk, str] = {}
        header = self._headers[file]
        if start == header.nbytes and block.span.start < start:
            found |= self._target_hasher.feed(block.span.start, header[block.span.start :])
        begin = _place(block, start)
        return found | self._target_hasher.feed(start, buffer[begin : begin + end - start])

    def write(self, block: Block, buffer: memoryview, digest: dict[Chunk, str]) -> None:
        """Write what the run has to write of the block."""
        start, end = block.written_range
        writer = self._writers[block.file]
        writer.write(start, buffer, _place(block, start), _place(block, end))
        self._ledger.wrote(writer, end - start, digest)

    def _hash_source(self, block: Block, source: memoryview) -> None:
        stored = block.tensor.source
        if stored is None:
            return
        if stored.name != self._source_name:
            self._source_name = stored.name
            self._source_hasher = ChunkHasher(stored.name, stored.nbytes)
        self._ledger.read(self._source_hasher.feed(block.source_span[0], source))


def _place(block: Block, position: int) -> int:
    """Return where in a block's buffer the byte at `position` of the file is."""
    start, _ = block.target_span
    return start % PAGE + position - start


def _array(buffer: memoryview, dtype: dtypes.DType, shape: tuple[int, ...]) -> Array:
    """Return an array of the given shape over the start of a buffer."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(buffer, np.uint8, count).view(dtype.numpy()).reshape(shape)
