"""The course of a conversion: open and plan, take the target, write it block by block, publish it.

One process does it, or all ranks of torch's default process group together, on a filesystem that they share. `convert`
and `merge` are requests of one kind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.hashing import blake3_of
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import read_whole, resolved
from gemma4_moe.checkpoint.values import value_notes
from gemma4_moe.converter.base import filled_in
from gemma4_moe.converter.blocks import Memory, plan_memory
from gemma4_moe.converter.merging import scales_for
from gemma4_moe.converter.notes import base_notes, overflow_notes, plan_notes
from gemma4_moe.converter.resume import is_made_already
from gemma4_moe.converter.sources import open_sources
from gemma4_moe.converter.space import space_for
from gemma4_moe.converter.write import Job, count_of, finish, write_weights
from gemma4_moe.distributed.ranks import current
from gemma4_moe.errors import StorageError
from gemma4_moe.hub.remote import commit_of
from gemma4_moe.lora.changes import change_notes
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.manifest import read_manifest
from gemma4_moe.target.preconditions import check_existing, check_order
from gemma4_moe.target.recovery import clean, heal
from gemma4_moe.target.transaction import Transaction

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.request import Request
    from gemma4_moe.converter.sources import Sources
    from gemma4_moe.converter.space import Space
    from gemma4_moe.target.pieces import Count


@dataclass(frozen=True, slots=True, repr=False)
class Conversion:
    """The result of `convert` and of `merge`.

    Attributes:
        target: The directory that it made.
        plan: The plan that was carried out.
        memory: The buffers that were used.
        notes: Sentences on the values: scales that are zero, negative or not finite; values of the source that are NaN
            or infinite, experts that are all zero or equal to another; experts that got the base's scale, or that
            without a base every scale is one; tensors that the config does not call for; casts that round, tensors that
            are not cast, and finite values that became infinite; of a merge, the norm of each layer's change.
        skipped: Names of files in the source directory that were not copied.
    """

    target: Path
    plan: Plan
    memory: Memory
    notes: tuple[str, ...]
    skipped: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Conversion into {self.target}, {len(self.notes)} notes: {self.plan}>"


def carry_out(request: Request, command: str) -> Conversion:
    """Carry out a request, which `command` would resume. All ranks must call; errors are those of `convert`."""
    assert request.target is not None, "a preview alone has none"
    ranks, target = current(), expanded(request.target)
    with ExitStack() as stack:
        with ranks.together("plan the conversion"):
            if not request.resume:
                check_order(request.source, target)
            sources = open_sources(stack, request, in_place=request.stream)
            sources.check_place(target)
            plan = sources.plan(request)
            memory = plan_memory(plan, parse_size(request.max_memory))
            space = space_for(plan, sources.opened, target, resolved(target).parent, stream=request.stream)
            if ranks.is_first and not (request.resume and target.exists()):  # it may be complete already
                _check_room(space, target)
        count = count_of(plan, ranks, space.cache_bytes, read_back=request.read_back, progress=request.progress)
        with ranks.together("read the source"):
            if not request.stream:
                sources.download(request.revision, count)
            count.begin_next_stage()
            folded = {name: t.scale.read() for name, t in plan.tensors.items() if t.scale is not None}
            scales = scales_for(plan.changes, sources.checkpoint)
            said = change_notes(plan.changes.values(), scales) if plan.changes else ()
            options = {"dtype": request.dtype, "max_shard_size": parse_size(request.max_shard_size)}
            options |= _identities(sources, request)
        job = Job(sources, plan, request, folded, scales, options, target, memory, command)
        transaction = None
        with ranks.together("take the target"):
            if ranks.is_first:
                heal(target)
                begun = _begun(job)
                transaction = None if begun is None else stack.enter_context(begun)
        (out, *_) = ranks.everyones(None if transaction is None else transaction.out)
        if out is not None:
            files = TargetFiles(out, plan.files, ranks, memory.peak_bytes, request.buffered)
            _write(job, files, transaction, count)
        notes = (*_notes(job), *said)
        return Conversion(target, plan, memory, notes, sources.checkpoint.skipped)


def _begun(job: Job) -> Transaction | None:
    """Return the transaction that makes the target; None, with all other work deleted, if it is made already."""
    request, target = job.request, job.target
    known = request.resume and job.base is None  # no manifest has hashes of a base
    memory, progress = job.memory.peak_bytes, request.progress
    if known and is_made_already(target, job.plan, job.checkpoint, job.options, memory, progress):
        clean(target, break_lock=request.break_lock)
        return None
    check_existing(target, overwrite=request.overwrite)
    return Transaction(target, resume=request.resume, break_lock=request.break_lock)


def _write(job: Job, files: TargetFiles, transaction: Transaction | None, count: Count) -> None:
    """Write the target, and publish it. All ranks must call; the first has the transaction."""
    finish(job, files, write_weights(job, files, None if transaction is None else transaction.confirm, count), count)
    with files.ranks.together("publish the target"):
        job.sources.check_unchanged()
        if transaction is not None:
            transaction.publish(overwrite=job.request.overwrite)


def _identities(sources: Sources, request: Request) -> dict[str, Any]:
    """Return the options that say which checkpoints were read, and how: commits of a stream, headers of all others."""
    source, base, scales, adapter = sources
    commits = {"commit": commit_of(source), "base_commit": base and commit_of(base)} if request.stream else {}
    headers = {"base": base and _headers(base), "scale_from": scales and _headers(scales)}
    forms = {"strip_wrappers": request.strip_wrappers or None, "scale": request.scale, "card": request.card or None}
    forms |= {"config_from": None if request.config_from is None else _config_digest(source)}
    said = {**commits, **headers, **forms, "adapter": adapter and adapter.hashes()}
    return {name: value for name, value in said.items() if value is not None}


def _config_digest(checkpoint: Checkpoint) -> str:
    directory = checkpoint.config_directory or checkpoint.path
    return blake3_of([read_whole(directory / CONFIG_NAME, LONGEST_CONFIG)])


def _headers(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: file.identity.header_digest for name, file in checkpoint.files.items()}


def _check_room(space: Space, target: Path) -> None:
    """Check that the disk has room for the models that would be downloaded, and for all of the target."""
    if not space.missing_bytes:
        return
    cached = f" and {space.cache_bytes:,} in the Hub's cache" if space.cache_bytes else ""
    raise StorageError(
        "the disk has no room for the model in the Hub's cache and for the target"
        if cached
        else "the disk has no room for the target",
        file=target,
        expected=f"{space.target_bytes:,} bytes for the target{cached}",
        found=f"{space.free_bytes:,} bytes free, {space.missing_bytes:,} too few",
        hint="free some space, or name a directory on another disk"
        if space.missing_without_cache
        else "give --stream: it keeps nothing of the model on this machine, and the target fits",
    )


def _notes(job: Job) -> tuple[str, ...]:
    plan, sources, said = job.plan, job.sources, read_manifest(job.target)
    named = {t.scale.name: job.folded[name] for name, t in plan.tensors.items() if t.scale is not None}
    values = value_notes(said["values"], named)
    overflows = overflow_notes(plan, said["overflowed"])
    names = [path.name for path in filled_in(sources.checkpoint, sources.base)]
    filled = [f"from the base, which the source lacks: {', '.join(names)}"] if names else []
    return (*values, *base_notes(plan, said["given_back"]), *filled, *plan_notes(plan, sources.checkpoint), *overflows)
