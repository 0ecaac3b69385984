"""Convert a checkpoint on disk between the layouts: a plan, taken block by block through fixed buffers."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemma4_moe import __version__, dtypes, kernels
from gemma4_moe.blocks import DEFAULT_MEMORY, Block, Memory, blocks, plan_memory
from gemma4_moe.checkpoints.directories import Checkpoint, open_checkpoint
from gemma4_moe.checkpoints.index import INDEX_NAME, write_index
from gemma4_moe.checkpoints.manifest import MANIFEST_NAME, build_manifest
from gemma4_moe.checkpoints.storage import refusals
from gemma4_moe.checkpoints.target import check_target
from gemma4_moe.checkpoints.transaction import Transaction, write_file
from gemma4_moe.checkpoints.writer import SafetensorsWriter
from gemma4_moe.layouts import Operation
from gemma4_moe.pipeline import run
from gemma4_moe.planning import DEFAULT_SHARD_SIZE, Plan, make_plan
from gemma4_moe.quantities import parse_size
from gemma4_moe.scales import read_scales, unusual_scales
from gemma4_moe.sources import locate
from gemma4_moe.transforms import transposes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.layouts import Layout
    from gemma4_moe.scales import Scales

Array = np.ndarray[Any, np.dtype[Any]]


class Progress(Protocol):
    """Told of the bytes of tensors written so far, from the writer's thread."""

    def __call__(self, done: int, total: int) -> None:
        """Take note that `done` of `total` bytes are written."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did.

    Attributes:
        target: The directory that it made.
        plan: What was planned, and done.
        memory: The buffers that were used.
        notes: What a user should know of the values: scales that are zero, negative or not finite; inexact casts.
        left_behind: Names in the source directory that were not taken along.
    """

    target: Path
    plan: Plan
    memory: Memory
    notes: tuple[str, ...]
    left_behind: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the checkpoint `source` into the new directory `target`.

    Args:
        source: A directory of safetensors files with its config.json, or a Hub id.
        target: A directory that does not exist yet, or is empty.
        to: The layout to convert to; the other one by default.
        dtype: "keep", or the dtype that every floating-point tensor gets.
        max_shard_size: The most bytes of tensors in one file, or text such as "5GB"; a larger tensor gets a file of
            its own.
        max_memory: The most bytes of buffers, likewise.
        workers: Threads of the kernel; the cores that this process may use by default.
        overwrite: Replace `target` if it is a checkpoint directory and nothing else.
        revision: Branch, tag or commit of a Hub id.
        progress: Told how far the writing is.

    Raises:
        InputError: The source is not a checkpoint that can be converted; nothing was written.
        UsageError: The target may not be written, or the budget is too small.
        StorageError: The disk or its permissions refused; the target is absent.
        TargetBusyError: Another process is writing the target.
        SourceChangedError: The source changed while it was read; the target is absent.
    """
    source, target = locate(source, revision), Path(target)
    check_target(target, source, overwrite=overwrite)
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, to=to, dtype=dtype, max_shard_size=max_shard_size)
        memory = plan_memory(plan, parse_size(max_memory))
        scales = read_scales(plan)
        with Transaction(target) as transaction:
            _write_weights(plan, memory, scales, transaction.out, workers, progress)
            checkpoint.check_unchanged()
            _write_rest(plan, checkpoint, scales, transaction.out)
            transaction.publish(overwrite=overwrite)
        return Conversion(target, plan, memory, _notes(plan, scales), checkpoint.left_behind)


def _notes(plan: Plan, scales: Scales) -> tuple[str, ...]:
    casts = (f"{n} tensors are rounded from {old.name} to {new.name}" for (old, new), n in plan.inexact.items())
    return (*unusual_scales(scales), *casts)


class _Steps:
    """Reads, converts and writes the blocks of one plan."""

    def __init__(
        self,
        plan: Plan,
        scales: Scales,
        writers: Mapping[str, SafetensorsWriter],
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        self._scales = scales
        self._writers = writers
        self._workers = workers
        self._progress = progress
        self._done = 0
        self._total = sum(entry.nbytes for file in plan.files for entry in file.entries)

    def read(self, block: Block, into: memoryview) -> None:
        offset, size = block.source_span
        if block.tensor.source is not None:
            block.tensor.source.read_into(into[:size], offset)

    def compute(self, block: Block, source: memoryview, into: memoryview) -> None:
        tensor = block.tensor
        rows = block.last - block.first
        result = _array(into, tensor.dtype, (rows, *tensor.shape[1:]) if transposes(tensor.operation) else (rows,))
        if tensor.source is None:
            result[...] = 1
        elif tensor.operation is Operation.KEEP:
            kernels.scale_cast(_array(source, tensor.source.dtype, (rows,)), out=result)
        else:
            scale = self._scales.get(tensor.name)
            kernels.transpose_scale_cast(
                _array(source, tensor.source.dtype, (rows, *tensor.source.shape[1:])),
                scale=None if scale is None else scale[block.first : block.last],
                out=result,
            )

    def write(self, block: Block, source: memoryview) -> None:
        offset, size = block.target_span
        self._writers[block.file].write(offset, source[:size])
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _array(buffer: memoryview, dtype: dtypes.DType, shape: tuple[int, ...]) -> Array:
    """Return an array of the given shape over the start of a buffer."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(buffer, np.uint8, count).view(dtype.numpy()).reshape(shape)


def _write_weights(
    plan: Plan,
    memory: Memory,
    scales: Scales,
    out: Path,
    workers: int | None,
    progress: Progress | None,
) -> None:
    with ExitStack() as stack:
        writers = {
            file.name: stack.enter_context(SafetensorsWriter(out / file.name, file.header, file.size))
            for file in plan.files
        }
        run(blocks(plan, memory.block_bytes), _Steps(plan, scales, writers, workers, progress), memory)


def _write_rest(plan: Plan, checkpoint: Checkpoint, scales: Scales, out: Path) -> None:
    """Write all that is not weights: side files byte for byte, the index, the manifest."""
    for path in checkpoint.side_files:
        with refusals("copy the file", path):
            shutil.copyfile(path, out / path.name)
    if len(plan.files) > 1:
        weight_map = {entry.name: file.name for file in plan.files for entry in file.entries}
        write_file(out / INDEX_NAME, write_index(weight_map, sum(t.nbytes for f in plan.files for t in f.entries)))
    write_file(out / MANIFEST_NAME, build_manifest(plan, checkpoint.files, scales, __version__))
