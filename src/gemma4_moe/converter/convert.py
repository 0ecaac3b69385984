"""Convert a checkpoint on disk between the layouts: a plan, taken block by block through fixed buffers.

One process does it, or all ranks of torch's default process group together, on a filesystem that they share.
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
from gemma4_moe.converter.blocks import DEFAULT_MEMORY, Memory, plan_memory
from gemma4_moe.converter.command import resume_command
from gemma4_moe.converter.notes import base_notes, overflow_notes, plan_notes
from gemma4_moe.converter.plan import Plan, make_plan
from gemma4_moe.converter.resume import is_made_already
from gemma4_moe.converter.sources import open_sources
from gemma4_moe.converter.space import space_for
from gemma4_moe.converter.write import Job, count_of, finish, write_weights
from gemma4_moe.distributed.ranks import current
from gemma4_moe.errors import StorageError
from gemma4_moe.hub.remote import commit_of
from gemma4_moe.hub.source import check_streamed
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE
from gemma4_moe.target.manifest import read_manifest
from gemma4_moe.target.preconditions import check_existing, check_order
from gemma4_moe.target.recovery import clean, heal
from gemma4_moe.target.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.base import Scales
    from gemma4_moe.converter.sources import Sources
    from gemma4_moe.converter.space import Space
    from gemma4_moe.layout.table import Layout
    from gemma4_moe.sizes import Progress
    from gemma4_moe.target.pieces import Count


@dataclass(frozen=True, slots=True, repr=False)
class Conversion:
    """The result of `convert`.

    Attributes:
        target: The directory that it made.
        plan: The plan that was carried out.
        memory: The buffers that were used.
        notes: Sentences on the values: scales that are zero, negative or not finite; values of the source that are NaN
            or infinite, experts that are all zero or equal to another; experts that got the base's scale, or that
            without a base every scale is one; tensors that the config does not call for; casts that round, tensors that
            are not cast, and finite values that became infinite.
        skipped: Names of files in the source directory that were not copied.
    """

    target: Path
    plan: Plan
    memory: Memory
    notes: tuple[str, ...]
    skipped: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Conversion into {self.target}, {len(self.notes)} notes: {self.plan}>"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Layout | str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    buffered: bool = False,
    read_back: bool = True,
    sha256: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    break_lock: bool = False,
    revision: str | None = None,
    stream: bool = False,
    base: str | Path | None = None,
    strip_wrappers: bool = False,
    scale: str | None = None,
    scale_from: str | Path | None = None,
    config_from: str | Path | None = None,
    card: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the checkpoint `source` into the new directory `target`.

    A run that fails or is interrupted leaves the target as it was. Blocks that it has journalled stay in a hidden
    directory next to the target, and `resume` continues from them. If no block is journalled, nothing stays.

    Args:
        source: A directory of safetensors files with its config.json, or a Hub id.
        target: A directory that does not exist yet, or is empty.
        to: The layout to convert to; by default the other one, or hf with a base. A source in parts may keep its own.
        dtype: "keep", or the dtype that every floating-point tensor gets, and config.json names.
        max_shard_size: The most bytes of tensors in one file, or text such as "5GB"; a larger tensor gets a file of
            its own.
        max_memory: The most bytes of buffers of each rank, likewise.
        workers: Threads of the kernel; by default the cores that this process may use, shared with the other ranks that
            torchrun has started on this host.
        buffered: Read and write through the page cache, even where it can be passed by.
        read_back: Read every file from the device and compare its hashes before the target appears.
        sha256: Put the SHA-256 of each source and target file into the manifest too; reads the source once more.
        overwrite: Replace `target` if it is a checkpoint directory and nothing else.
        resume: Go on with an earlier run to this target, if there is one.
        break_lock: Take the target from a process that can't be shown to live.
        revision: Branch, tag or commit of a Hub id.
        stream: Read a source or a base on the Hub in place, and keep nothing of it but the target.
        base: To hf, from either layout: the hf checkpoint that the model was made from, a directory or a Hub id. An
            expert that folds to what the base's folds to gets the base's weights and scale. The base's files of
            tokenizer, template and processor fill in. `resume` does not know a complete target then.
        strip_wrappers: Remove the components of wrappers from the source's names, and give each the prefix of the
            config's kind of model (`layout.prefixes`).
        scale: "ones" for an hf source that has lost each `per_expert_scale` because it was folded into the weights.
        scale_from: The hf checkpoint, a directory or a Hub id, that has the scales which a source has lost.
        config_from: The checkpoint, a directory or a Hub id, whose config.json is used and copied in place of the
            source's; that of a step has none, or one that was written anew.
        card: Also write a model card, README.md, that says how the target was made; a source's own is kept.
        progress: Called with the bytes that are done so far and with their total: of downloads, of the target as it is
            written or found written, and of the target as it is read back.

    Raises:
        InputError: The source is not a checkpoint that can be converted; nothing was written.
        UsageError: The target may not be written; the budget is too small; there is an earlier run to go on with, or
            `resume` is given and it is another run.
        StorageError: The disk or its permissions refused.
        TargetBusyError: Another process is writing the target.
        SourceChangedError: The source changed while it was read.
        ParallelError: Another rank failed.
    """
    command = resume_command(convert, locals())
    ranks, target = current(), expanded(target)
    with ExitStack() as stack:
        with ranks.together("plan the conversion"):
            _check_arguments(source, target, base, resume=resume, stream=stream)
            forms: dict[str, Any] = {"strip_wrappers": strip_wrappers, "scale": scale}
            forms |= {"scale_from": scale_from, "config_from": config_from}
            sources = open_sources(stack, source, revision, base, in_place=stream, **forms)
            sources.check_place(target)
            checkpoint, origin = sources.checkpoint, sources.base
            plan = make_plan(checkpoint, to=to, dtype=dtype, max_shard_size=max_shard_size, base=origin)
            memory = plan_memory(plan, parse_size(max_memory))
            space = space_for(plan, sources.opened, target, resolved(target).parent, stream=stream)
            _check_room(space, target, is_needed=ranks.is_first and not (resume and target.exists()))
        count = count_of(plan, ranks, space.cache_bytes, read_back=read_back, progress=progress)
        with ranks.together("read the source"):
            if not stream:
                sources.download(revision, count)
            count.begin_next_stage()
            folded = {name: t.scale.read() for name, t in plan.tensors.items() if t.scale is not None}
            options = _options(sources, dtype, parse_size(max_shard_size), stream=stream, forms=forms, card=card)
        transaction = None
        with ranks.together("take the target"):
            if ranks.is_first:
                heal(target)
                known = resume and origin is None  # no manifest has hashes of a base
                made = known and is_made_already(target, plan, checkpoint, options, memory.peak_bytes, progress)
                begun = _begun(target, made=made, overwrite=overwrite, resume=resume, break_lock=break_lock)
                transaction = None if begun is None else stack.enter_context(begun)
        (out, *_) = ranks.everyones(None if transaction is None else transaction.out)
        if out is not None:
            files = TargetFiles(out, plan.files, ranks, memory.peak_bytes, buffered)
            job = Job(sources, plan, folded, options, target, files, memory, workers, read_back, sha256, command)
            _carry_out(job, transaction, count, overwrite=overwrite)
        return Conversion(target, plan, memory, _notes(target, plan, folded, sources), checkpoint.skipped)


def _check_arguments(source: str | Path, target: Path, base: str | Path | None, *, resume: bool, stream: bool) -> None:
    if not resume:
        check_order(source, target)
    if stream:
        check_streamed(source, base)


def _begun(target: Path, *, made: bool, overwrite: bool, resume: bool, break_lock: bool) -> Transaction | None:
    """Return the transaction that makes the target; None, with all other work deleted, if it is made already."""
    if made:
        clean(target, break_lock=break_lock)
        return None
    check_existing(target, overwrite=overwrite)
    return Transaction(target, resume=resume, break_lock=break_lock)


def _carry_out(job: Job, transaction: Transaction | None, count: Count, *, overwrite: bool) -> None:
    """Write the target, and publish it. All ranks must call; the first has the transaction."""
    finish(job, write_weights(job, None if transaction is None else transaction.confirm, count), count)
    with job.files.ranks.together("publish the target"):
        job.check_unchanged()
        if transaction is not None:
            transaction.publish(overwrite=overwrite)


def _options(
    sources: Sources, dtype: str, max_shard_size: int, *, stream: bool, forms: Mapping[str, Any], card: bool
) -> dict[str, Any]:
    """Return the options that decide the target's bytes, and which checkpoints were read, and how.

    A stream is told by its commits, all else by its headers.
    """
    source, base, scales = sources
    commits = {"commit": commit_of(source), "base_commit": base and commit_of(base)} if stream else {}
    headers = {"base": base and _headers(base), "scale_from": scales and _headers(scales)}
    config = None if forms["config_from"] is None else _config_digest(source)
    read_as = {"config_from": config, "strip_wrappers": forms["strip_wrappers"] or None, "scale": forms["scale"]}
    said = {"dtype": dtype, "max_shard_size": max_shard_size, "card": card or None, **commits, **headers, **read_as}
    return {name: value for name, value in said.items() if value is not None}


def _config_digest(checkpoint: Checkpoint) -> str:
    directory = checkpoint.config_directory or checkpoint.path
    return blake3_of([read_whole(directory / CONFIG_NAME, LONGEST_CONFIG)])


def _headers(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: file.identity.header_digest for name, file in checkpoint.files.items()}


def _check_room(space: Space, target: Path, *, is_needed: bool) -> None:
    """Check that the disk has room for the models that would be downloaded, and for all of the target.

    None is needed by other ranks than the first, nor by a target that is there and may be complete.
    """
    if not is_needed or not space.missing_bytes:
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


def _notes(target: Path, plan: Plan, scales: Scales, sources: Sources) -> tuple[str, ...]:
    said = read_manifest(target)
    named = {t.scale.name: scales[name] for name, t in plan.tensors.items() if t.scale is not None}
    values = value_notes(said["values"], named)
    overflows = overflow_notes(plan, said["overflowed"])
    names = [path.name for path in filled_in(sources.checkpoint, sources.base)]
    filled = [f"from the base, which the source lacks: {', '.join(names)}"] if names else []
    return (*values, *base_notes(plan, said["given_back"]), *filled, *plan_notes(plan, sources.checkpoint), *overflows)
