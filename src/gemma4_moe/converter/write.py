"""Write a conversion's weights: what is not on the device yet, each rank its share, journalled as it gets there."""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.hashing import Chunk
from gemma4_moe.checkpoint.storage import refusals, sync_directory
from gemma4_moe.converter.blocks import blocks
from gemma4_moe.converter.pipeline import run
from gemma4_moe.converter.resume import check_same_run, check_same_source, opening_record, true_chunks
from gemma4_moe.converter.shares import header_hashes, share
from gemma4_moe.converter.steps import ConversionSteps
from gemma4_moe.converter.unfold import Unfolding
from gemma4_moe.errors import Gemma4MoEError
from gemma4_moe.target.journal import Journal, read_journals
from gemma4_moe.target.ledger import Ledger
from gemma4_moe.target.writers import PageWriter, SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_moe.converter.job import Job
    from gemma4_moe.target.journal import Journalled
    from gemma4_moe.target.ledger import Progress


def write_weights(job: Job, confirm: Callable[[], None] | None, progress: Progress | None) -> None:
    """Write all weight files of a job that are not there yet. All ranks must call.

    Args:
        job: The job.
        confirm: Called now and then; raises if the target is not ours any more. Rank 0's.
        progress: Told how far this rank's writing is.

    Raises:
        UsageError: What an earlier run has left belongs to another conversion.
        SourceChangedError: The source changed while it was read.
        StorageError: The disk or its permissions refused.
        ParallelError: Another rank failed.
    """
    opening = opening_record(job.plan, job.checkpoint, job.options, job.base)
    with job.ranks.together("read the journal"):
        known = read_journals(job.control)
        check_same_run(known, opening, job.target)
    check_same_source(job.ranks.everyones(opening))
    with job.ranks.together("check what is there"):
        own = true_chunks(known, job)
    true = set[Chunk]().union(*job.ranks.everyones(own))
    known.target = {chunk: digest for chunk, digest in known.target.items() if chunk in true}
    with job.ranks.together("make the target's files"):
        if job.ranks.is_first:
            _make_files(job)
    with job.ranks.together("write the target"), Journal(job.control, job.ranks.rank) as journal:
        sync_directory(job.control)
        journal.append(opening=opening)
        _write_share(job, known, journal, confirm, progress)


def _write_share(
    job: Job, known: Journalled, journal: Journal, confirm: Callable[[], None] | None, progress: Progress | None
) -> None:
    spans = share(job.plan, known.target, job.ranks.rank, job.ranks.world)
    work = list(blocks(job.plan, job.memory.block_bytes, spans))
    total = sum(end - start for start, end in (block.written_range for block in work))

    def check() -> None:
        if confirm is not None:
            confirm()
        job.check_unchanged()

    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(closing(file.reader(buffered=True) if job.buffered else file.quickest_reader()))
            for name, file in job.checkpoint.files.items()
        }
        writers = {
            file.name: stack.enter_context(
                closing(
                    PageWriter(
                        stack.enter_context(SafetensorsWriter.reopen(job.out / file.name, file.size)),
                        buffered=job.buffered,
                    )
                )
            )
            for file in job.plan.files
            if any(span.file == file.name for span in spans)
        }
        ledger = Ledger(journal, known, check, total, progress)
        unfolding = stack.enter_context(
            Unfolding(job.plan.tensors.values(), job.memory.base_bytes, workers=job.workers, buffered=job.buffered)
        )
        steps = ConversionSteps(job, readers, writers, ledger, unfolding)
        try:
            for chunk, digest in header_hashes(job.plan, spans).items():
                ledger.wrote(writers[chunk.name], 0, {chunk: digest})
            run(work, steps, job.memory)
        except BaseException:
            with suppress(Gemma4MoEError):  # what is on the device is of use to a later run
                ledger.flush()
            raise
        ledger.flush()


def _make_files(job: Job) -> None:
    """Make each weight file at its full size, or take the one that is there; remove all others."""
    planned = {file.name: file for file in job.plan.files}
    with refusals("look at the directory", job.out):
        for path in job.out.iterdir():
            if path.name not in planned or path.stat().st_size != planned[path.name].size:
                path.unlink()
    for name, file in planned.items():
        path = job.out / name
        with refusals("look at the file", path):
            is_there = path.exists()
        if is_there:
            with SafetensorsWriter.reopen(path, file.size) as writer:
                writer.write(0, memoryview(file.header))
        else:
            SafetensorsWriter(path, file.header, file.size).close()
    sync_directory(job.out)
