"""Write a conversion's files: the blocks that are not on the device yet, each rank its share of them, then the rest."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.blobs import check_blob
from gemma4_moe.checkpoint.config_dtype import rewritten
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.hashing import Extent, hash_extents
from gemma4_moe.checkpoint.storage import sync_directory
from gemma4_moe.checkpoint.values import Oddities
from gemma4_moe.converter import resume
from gemma4_moe.converter.base import (
    CARD_NAME,
    Unfolding,
    filled_in,
    given_back_scales,
    own_scales,
    scales_with_base,
)
from gemma4_moe.converter.blocks import blocks, share
from gemma4_moe.converter.card import card_of
from gemma4_moe.converter.merging import Merging
from gemma4_moe.converter.steps import ConversionSteps, run
from gemma4_moe.distributed.ranks import ranks_on_this_host
from gemma4_moe.errors import Gemma4MoEError
from gemma4_moe.kernels.choice import allowed_cores
from gemma4_moe.target.journal import Journal, Ledger, read_journals
from gemma4_moe.target.pieces import Count, wrong_pieces
from gemma4_moe.target.writers import PageWriter, SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.readers import Readable, Reader
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.base import FoldedScales
    from gemma4_moe.converter.blocks import Block, Memory
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.request import Request
    from gemma4_moe.converter.sources import Sources
    from gemma4_moe.distributed.ranks import Ranks
    from gemma4_moe.layout.targets import Source
    from gemma4_moe.lora.scales import Scales
    from gemma4_moe.sizes import Progress
    from gemma4_moe.target.directory import TargetFiles
    from gemma4_moe.target.journal import Journalled
    from gemma4_moe.target.pieces import Piece


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that has begun.

    `folded` maps a target's name to the scale [E] that is folded into it, `scales` are those that changes need.
    `options` are the arguments that decide the target's bytes, and `command` is the command line that resumes the
    conversion.
    """

    sources: Sources
    plan: Plan
    request: Request
    folded: FoldedScales
    scales: Scales | None
    options: dict[str, Any]
    target: Path
    memory: Memory
    command: str

    @property
    def threads(self) -> int:
        """Threads of the kernel: `workers`, or else this rank's share of the cores."""
        return self.request.workers or max(1, allowed_cores() // ranks_on_this_host())

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.sources.checkpoint

    @property
    def base(self) -> Checkpoint | None:
        """The base, if there is one."""
        return self.sources.base


def count_of(plan: Plan, ranks: Ranks, fetched: int, *, read_back: bool, progress: Progress | None) -> Count:
    """Return the count of a rank's bytes: those `fetched` from the Hub, its share of the target, and its read-back.

    A byte of the target is counted once, when it is written, or when it is found to be on the device already.
    """
    share = plan.target_bytes // ranks.world
    return Count([fetched, share, share if read_back else 0], progress)


def write_weights(job: Job, files: TargetFiles, confirm: Callable[[], None] | None, count: Count) -> list[Piece]:
    """Write all blocks of a job that are not there yet, and return the pieces of all. All ranks must call.

    `confirm` is given on rank 0 alone. It is called before each journal entry, and raises if our lock was broken.
    """
    ranks, control = files.ranks, files.out.parent
    opening = resume.opening_record(job.plan, job.checkpoint, job.options, job.base)
    with ranks.together("read the journal"):
        known = read_journals(control)
        resume.check_same_run(known, opening, job.command, job.target)
    resume.check_same_source(ranks.everyones(opening))
    with ranks.together("check the pieces that are there"):
        own = _true_pieces(known, job, files, count)
    pieces = list(chain(*ranks.everyones(own)))
    with ranks.together("make the target's files"):
        if ranks.is_first:
            files.make()
    done = {piece.place for piece in pieces}
    late = scales_with_base(job.plan.bases)
    soon = share((b for b in blocks(job.plan) if b.tensor.name not in late), done, ranks.rank, ranks.world)
    last = [b for b in blocks(job.plan) if b.tensor.name in late and b.place not in done and ranks.is_first]

    def check() -> None:
        if confirm is not None:
            confirm()
        job.sources.check_unchanged()

    with ExitStack() as stack:
        with ranks.together("write the target"):
            journal = stack.enter_context(Journal(control, ranks.rank))
            sync_directory(control)
            journal.append(opening=opening, command=job.command)
            ledger = Ledger(journal, known, check, count)
            own = _write(job, files, soon, {}, ledger)
        pieces += chain(*ranks.everyones(own))
        with ranks.together("write the scales"):
            scales = given_back_scales(job.plan.bases, own_scales(job.plan.bases, job.plan.tensors), pieces)
            own = _write(job, files, last, scales, ledger) if last else []
    return [*pieces, *chain(*ranks.everyones(own))]


def _true_pieces(known: Journalled, job: Job, files: TargetFiles, count: Count) -> list[Piece]:
    """Return those journalled pieces of this rank's part that are on the device."""
    places = {block.place for block in blocks(job.plan)}
    journalled = [piece for place, piece in sorted(known.pieces.items()) if place in places]
    mine = journalled[files.ranks.rank :: files.ranks.world]
    sizes = {file.name: file.size for file in job.plan.files}
    wrong = wrong_pieces(files.out, sizes, mine, job.memory.peak_bytes, buffered=files.buffered, hashed=count)
    return [piece for piece in mine if piece not in wrong]


def _write(job: Job, files: TargetFiles, work: list[Block], given_back: FoldedScales, ledger: Ledger) -> list[Piece]:
    """Take blocks through the pipeline, and return their pieces once these are on the device."""
    buffered = files.buffered
    with ExitStack() as stack:

        def reading(file: Readable, *, in_order: bool) -> Reader:
            quickest = in_order and not buffered
            return stack.enter_context(closing(file.quickest_reader() if quickest else file.reader(buffered=buffered)))

        def writing(path: Path, size: int) -> PageWriter:
            file = stack.enter_context(SafetensorsWriter.reopen(path, size))
            return stack.enter_context(closing(PageWriter(file, buffered=buffered)))

        sources = _files(tensor.source for tensor in job.plan.tensors.values())
        bases = _files(base.weights for base in job.plan.bases.values())
        names = {block.file for block in work}
        pool = stack.enter_context(ThreadPoolExecutor(job.threads, "gemma4-moe-unfolding"))
        steps = ConversionSteps(
            job.folded,
            job.threads,
            readers={file: reading(file, in_order=True) for file in sources},
            writers={f.name: writing(files.out / f.name, f.size) for f in job.plan.files if f.name in names},
            ledger=ledger,
            unfolding=Unfolding(
                job.plan.bases,
                own_scales(job.plan.bases, job.plan.tensors),
                job.memory.base_bytes,
                readers={file: reading(file, in_order=False) for file in bases},
                pool=pool,
            ),
            merging=Merging(job.plan.changes, job.scales, job.threads),
            given_back=given_back,
        )
        try:
            run(work, steps, job.memory)
        except BaseException:
            with suppress(Gemma4MoEError):  # a later run resumes from what is on the device
                ledger.flush()
            raise
        ledger.flush()
    return steps.written


def _files(sources: Iterable[Source[StoredTensor] | None]) -> list[Readable]:
    """Return the files that sources are read from, each once."""
    read = [part.stored.file for source in sources if source is not None for part in source.parts]
    return list(dict.fromkeys(read))


def finish(job: Job, files: TargetFiles, pieces: Sequence[Piece], count: Count) -> None:
    """Write all files but the weights, whose pieces are given, and read every file back. All ranks must call."""
    count.begin_next_stage()
    own = pieces if files.ranks.is_first else ()
    side_files = (*job.checkpoint.side_files, *filled_in(job.checkpoint, job.base))
    dtype = None if job.plan.cast is None else job.plan.cast.name

    def documents() -> dict[str, bytes]:
        made = dict(rewritten(side_files, dtype, dequantised=job.checkpoint.dequantised))
        if job.request.card and all(path.name != CARD_NAME for path in side_files):
            made[CARD_NAME] = card_of(job.plan, job.checkpoint, job.base, job.target.name, _given_back(job, pieces))
        return made

    written = files.complete(own, side_files, lambda said: _manifest(job, files, said, pieces), documents)
    if job.request.read_back:
        files.read_back(written, count)


def _manifest(job: Job, files: TargetFiles, said: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the manifest without the files, and add SHA-256 to those that are `said`."""
    plan = job.plan
    digests = {piece.place: piece.facts["source"] for piece in pieces if "source" in piece.facts}
    source = resume.described_source(plan, job.checkpoint, digests)
    if job.request.sha256:
        with ExitStack() as stack:
            written = [stack.enter_context(OpenFile(files.out / name)) for name in said]
            opened: list[OpenFile] = [*written, *job.checkpoint.files.values()]
            whole = [(Extent(file, 0, file.size),) for file in opened]
            found = hash_extents(whole, job.memory.peak_bytes, buffered=files.buffered, algorithm=hashlib.sha256)
        for file, facts, digest in zip(opened, [*said.values(), *source["files"].values()], found, strict=True):
            check_blob(file.path, digest)
            facts["sha256"] = digest
    odd = Oddities()
    for piece in pieces:
        odd.add(piece.facts.get("values", {}))
    odd.compare(job.checkpoint.tensors, job.memory.peak_bytes, buffered=files.buffered)
    return {
        "plan": resume.plan_digest(plan),
        "options": job.options | {"to": plan.target_layout, "read_back": job.request.read_back},
        "layout": plan.target_layout,
        "source": source,
        "source_dtypes": {name: t.source.dtype.name for name, t in plan.tensors.items() if t.source is not None},
        "values": odd.document(),
        "overflowed": _counts(plan, ((piece, piece.facts.get("overflowed", 0)) for piece in pieces)),
        "given_back": _given_back(job, pieces),
        "folded_scales": {name: [_number(value) for value in scale.tolist()] for name, scale in job.folded.items()},
    }


def _given_back(job: Job, pieces: Iterable[Piece]) -> dict[str, int]:
    """Return how many experts of each `down_proj` are the base's."""
    return _counts(job.plan, ((piece, len(piece.facts.get("given_back", ()))) for piece in pieces))


def _counts(plan: Plan, counted: Iterable[tuple[Piece, int]]) -> dict[str, int]:
    """Return the sum of counts for each tensor that has one, in the order of the plan."""
    counts: Counter[str] = Counter()
    for piece, count in counted:
        if count:
            counts[piece.facts["tensor"]] += count
    return {name: counts[name] for name in plan.tensors if name in counts}


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinities."""
    return float(value) if math.isfinite(value) else str(float(value))
