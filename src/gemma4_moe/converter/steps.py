"""What the threads of a conversion do with a block: read it, convert it, hash it, write it."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoint.hashing import Chunk, ChunkHasher
from gemma4_moe.checkpoint.readers import PAGE, SLACK, whole_pages
from gemma4_moe.converter.overflows import can_overflow, overflows_by_chunk
from gemma4_moe.layout.table import Operation, transposes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.readers import Reader
    from gemma4_moe.converter.blocks import Block
    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.unfold import Unfolding
    from gemma4_moe.layout import dtypes
    from gemma4_moe.layout.targets import Source
    from gemma4_moe.target.journal import Overflows
    from gemma4_moe.target.ledger import Ledger
    from gemma4_moe.target.writers import PageWriter

Array = np.ndarray[Any, np.dtype[Any]]


class ConversionSteps:
    """Reads, converts, hashes and writes the blocks of one job."""

    def __init__(
        self,
        job: Job,
        readers: Mapping[str, Reader],
        writers: Mapping[str, PageWriter],
        ledger: Ledger,
        unfolding: Unfolding,
    ) -> None:
        """Take what the steps work with.

        Args:
            job: What is done.
            readers: The source's files by name.
            writers: The target's files by name.
            ledger: Told of what was read and written.
            unfolding: The experts whose scales come back.
        """
        self._scales = job.scales
        self._unfolding = unfolding
        self._readers = readers
        self._writers = writers
        self._ledger = ledger
        self._workers = job.workers
        self._headers = {file.name: memoryview(file.header) for file in job.plan.files}
        self._sizes = {file.name: file.size for file in job.plan.files}
        self._source_hashers: dict[str, ChunkHasher] = {}
        self._source_name = ""
        self._target_hasher = ChunkHasher("", 0)
        self._target_name = ""
        self._overflows: deque[Counter[int]] = deque()  # of each block, from the computing to the hashing thread
        self._counts: dict[Chunk, Counter[str]] = {}  # of each chunk that is not complete, by tensors

    def read(self, block: Block, buffer: memoryview) -> Sequence[memoryview]:
        """Read the block's source bytes, each read with the pages around it. Scales have none: they get the buffer."""
        found, place = [], 0
        for read in block.reads:
            entry, file, size = read.stored.entry, read.stored.file, read.end - read.start
            found.append(self._readers[file.path.name].read(entry.start + read.start, size, buffer[place:]))
            place += whole_pages(size) + SLACK
        return found or [buffer]

    def compute(self, block: Block, source: Sequence[memoryview], buffer: memoryview) -> None:
        """Make the block's target bytes, as far behind a page as they are in the file."""
        self._hash_source(block, source)
        offset, size = block.target_span
        into = buffer[offset % PAGE : offset % PAGE + size]
        if block.is_copy:
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source[0], np.uint8))
            self._overflows.append(Counter())
        else:
            self._overflows.append(self._convert(block, source, into))

    def _convert(self, block: Block, source: Sequence[memoryview], into: memoryview) -> Counter[int]:
        """Make a block that is no copy, and count by chunks of the file which finite values have become infinite."""
        tensor, part = block.tensor, slice(block.first, block.last)
        rows = block.last - block.first
        result = _array(into, tensor.dtype, (rows, *tensor.shape[1:]) if transposes(tensor.operation) else (rows,))
        if tensor.source is None:
            scales = self._unfolding.scales(tensor.name, source[0])
            result[...] = 1 if scales is None else scales[part]
            return Counter()
        if tensor.operation is Operation.KEEP:
            given = _array(source[0], tensor.source.dtype, (rows,))
            kernels.scale_cast(given, out=result, threads=self._workers)
        else:
            given = self._convert_experts(block, tensor.source, source, result)
        if not can_overflow(tensor.source.dtype, tensor.dtype):
            return Counter()
        return overflows_by_chunk(given, result, *block.written_range, block.target_span[0])

    def _convert_experts(
        self, block: Block, source: Source[StoredTensor], read: Sequence[memoryview], result: Array
    ) -> Array:
        """Convert what each read holds to its place in the block, and return the block's values as they were."""
        tensor = block.tensor
        scale, columns, given = self._scales.get(tensor.name), source.shape[2], []
        for place, raw in zip(block.reads, read, strict=True):
            (first, last), (top, bottom) = place.experts, place.rows
            experts = _array(raw, source.dtype, (last - first, bottom - top, columns))
            out = result[first - block.first : last - block.first, :, top:bottom]
            if tensor.comes_back:
                self._unfolding.convert(tensor.name, first, experts, out)
            else:
                factors = None if scale is None else scale[first:last]
                kernels.transpose_scale_cast(experts, scale=factors, out=out, threads=self._workers)
            given.append((experts.swapaxes(1, 2), out))
        if len(given) == 1:
            return given[0][0]
        whole = np.empty(result.shape, source.dtype.numpy())
        for place, (values, _) in zip(block.reads, given, strict=True):
            whole[place.experts[0] - block.first : place.experts[1] - block.first, :, slice(*place.rows)] = values
        return whole

    def digest(self, block: Block, buffer: memoryview) -> tuple[dict[Chunk, str], Overflows]:
        """Return the hash of each chunk of the target's file that the block completes, and what overflowed in it."""
        file, (start, end) = block.file, block.written_range
        if file != self._target_name:
            self._target_name = file
            self._target_hasher = ChunkHasher(file, self._sizes[file])
        found: dict[Chunk, str] = {}
        header = self._headers[file]
        if start == header.nbytes and block.span.start < start:
            found |= self._target_hasher.feed(block.span.start, header[block.span.start :])
        begin = _place(block, start)
        found |= self._target_hasher.feed(start, buffer[begin : begin + end - start])
        for number, count in self._overflows.popleft().items():
            self._counts.setdefault(Chunk(file, number), Counter())[block.tensor.name] += count
        return found, {chunk: self._counts.pop(chunk) for chunk in found if chunk in self._counts}

    def write(self, block: Block, buffer: memoryview, digest: tuple[dict[Chunk, str], Overflows]) -> None:
        """Write what the run has to write of the block."""
        start, end = block.written_range
        writer = self._writers[block.file]
        writer.write(start, buffer, _place(block, start), _place(block, end))
        self._ledger.wrote(writer, end - start, *digest)

    def _hash_source(self, block: Block, source: Sequence[memoryview]) -> None:
        if block.tensor.source is None:
            return
        if block.tensor.name != self._source_name:
            self._source_name, self._source_hashers = block.tensor.name, {}
        for read, raw in zip(block.reads, source, strict=True):
            stored = read.stored
            hasher = self._source_hashers.setdefault(stored.name, ChunkHasher(stored.name, stored.nbytes))
            self._ledger.read(hasher.feed(read.start, raw))


def _place(block: Block, position: int) -> int:
    """Return where in a block's buffer the byte at `position` of the file is."""
    start, _ = block.target_span
    return start % PAGE + position - start


def _array(buffer: memoryview, dtype: dtypes.DType, shape: tuple[int, ...]) -> Array:
    """Return an array of the given shape over the start of a buffer."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(buffer, np.uint8, count).view(dtype.numpy()).reshape(shape)
