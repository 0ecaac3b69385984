"""Write a conversion's weights: the blocks that are not on the device yet, each rank its share of them."""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from itertools import chain
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.storage import sync_directory
from gemma4_moe.converter.blocks import blocks, share
from gemma4_moe.converter.pipeline import run
from gemma4_moe.converter.resume import check_same_run, check_same_source, opening_record, true_pieces
from gemma4_moe.converter.scales import given_back_scales, scales_with_base
from gemma4_moe.converter.steps import ConversionSteps
from gemma4_moe.converter.unfold import Unfolding
from gemma4_moe.errors import Gemma4MoEError
from gemma4_moe.target.journal import Journal, Ledger, read_journals
from gemma4_moe.target.pieces import Count
from gemma4_moe.target.writers import PageWriter, SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma4_moe.converter.blocks import Block
    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.scales import Scales
    from gemma4_moe.sizes import Progress
    from gemma4_moe.target.pieces import Piece


def write_weights(job: Job, confirm: Callable[[], None] | None, progress: Progress | None) -> list[Piece]:
    """Write all blocks of a job that are not there yet. All ranks must call.

    Args:
        job: The job.
        confirm: Called before each journal entry; raises if the target is not ours any more. Rank 0's.
        progress: Told how far this rank's writing is.

    Returns:
        The pieces of all blocks, on every rank.

    Raises:
        UsageError: An earlier run to this target was another conversion.
        SourceChangedError: The source changed while it was read.
        StorageError: The disk or its permissions refused.
        ParallelError: Another rank failed.
    """
    ranks = job.files.ranks
    opening = opening_record(job.plan, job.checkpoint, job.options, job.base)
    with ranks.together("read the journal"):
        known = read_journals(job.control)
        check_same_run(known, opening, job.target)
    check_same_source(ranks.everyones(opening))
    with ranks.together("check the pieces that are there"):
        own = true_pieces(known, job)
    pieces = list(chain(*ranks.everyones(own)))
    with ranks.together("make the target's files"):
        if ranks.is_first:
            job.files.make()
    done = {piece.place for piece in pieces}
    late = scales_with_base(job.plan)
    soon = share((b for b in blocks(job.plan) if b.tensor.name not in late), done, ranks.rank, ranks.world)
    last = [b for b in blocks(job.plan) if b.tensor.name in late and b.place not in done and ranks.is_first]
    count = Count(sum(block.end - block.start for block in soon + last), progress)

    def check() -> None:
        if confirm is not None:
            confirm()
        job.check_unchanged()

    with ranks.together("write the target"), Journal(job.control, ranks.rank) as journal:
        sync_directory(job.control)
        journal.append(opening=opening)
        own = _write(job, soon, {}, Ledger(journal, known, check, count))
    pieces += chain(*ranks.everyones(own))
    own = []
    with ranks.together("write the scales"):
        if last:
            with Journal(job.control, ranks.rank) as journal:
                own = _write(job, last, given_back_scales(job.plan, pieces), Ledger(journal, known, check, count))
    return [*pieces, *chain(*ranks.everyones(own))]


def _write(job: Job, work: list[Block], given_back: Scales, ledger: Ledger) -> list[Piece]:
    """Take blocks through the pipeline, and return their pieces once these are on the device."""
    with ExitStack() as stack:

        def opened(path: Path, size: int) -> PageWriter:
            file = stack.enter_context(SafetensorsWriter.reopen(path, size))
            return stack.enter_context(closing(PageWriter(file, buffered=job.files.buffered)))

        readers = {
            name: stack.enter_context(
                closing(file.reader(buffered=True) if job.files.buffered else file.quickest_reader())
            )
            for name, file in job.checkpoint.files.items()
        }
        names = {block.file for block in work}
        writers = {
            file.name: opened(job.files.out / file.name, file.size) for file in job.plan.files if file.name in names
        }
        unfolding = stack.enter_context(
            Unfolding(
                job.plan.tensors.values(), job.memory.base_bytes, workers=job.workers, buffered=job.files.buffered
            )
        )
        steps = ConversionSteps(job, readers, writers, ledger, unfolding, given_back)
        try:
            run(work, steps, job.memory)
        except BaseException:
            with suppress(Gemma4MoEError):  # a later run resumes from what is on the device
                ledger.flush()
            raise
        ledger.flush()
    return steps.written
