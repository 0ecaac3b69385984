"""Whether a run may go on from what another has left: what a conversion is, in words that two runs can compare."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import OpenFile, hash_extents, tensor_chunks
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.errors import InputError, ParallelError, UsageError, command_line
from gemma4_moe.target.manifest import hashed_tensors, read_manifest
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint, StoredTensor
    from gemma4_moe.checkpoint.hashing import Chunk, Extent
    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.target.journal import Journalled


def plan_digest(plan: Plan) -> str:
    """Return a hash of all that decides a plan's bytes but the values: names, places, shapes, dtypes, operations."""
    files = [(file.name, file.size, blake3(file.header).hexdigest()) for file in plan.files]
    tensors = [
        (
            tensor.name,
            tensor.operation,
            [_place(stored) for stored in tensor.stored],
            None
            if tensor.folded is None
            else (tensor.folded.dtype.name, [scale.hex() for scale in tensor.folded.scale]),
            *([] if tensor.base is None else map(_place, tensor.base.stored)),
        )
        for tensor in plan.tensors.values()
    ]
    text = json.dumps([plan.source_layout, plan.target_layout, files, tensors])
    return blake3(text.encode()).hexdigest()


def _place(stored: StoredTensor) -> tuple[str, str, int, str]:
    return stored.name, stored.file.path.name, stored.entry.start, stored.dtype.name


def opening_record(
    plan: Plan, checkpoint: Checkpoint, options: Mapping[str, Any], base: Checkpoint | None = None
) -> dict[str, Any]:
    """Return what a journal begins with. Two runs may share a target's parts if theirs are the same."""
    return {
        "version": __version__,
        "chunk_bytes": hashing.CHUNK_BYTES,
        "plan": plan_digest(plan),
        "options": dict(options),
        "source": _identities(checkpoint),
    } | ({} if base is None else {"base": _identities(base)})


def _identities(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        name: {
            "bytes": file.identity.size,
            "mtime_ns": file.identity.mtime_ns,
            "inode": file.identity.inode,
            "header_sha256": file.identity.header_digest,
        }
        for name, file in checkpoint.files.items()
    }


def check_same_run(known: Journalled, opening: Mapping[str, Any], target: Path) -> None:
    """Check that what was journalled belongs to the run that is about to go on.

    Raises:
        UsageError: It does not; the error says what differs.
    """
    if known.opening is None or known.opening == opening:
        return
    raise UsageError(
        "the run that was not finished is another one",
        file=target,
        found="; ".join(list(_differences(known.opening, opening, ""))[:5]),
        hint=f"give the same source and options, or remove it: {command_line('gemma4-moe', 'clean', target)}",
    )


def check_same_source(openings: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks see the same source and the same plan.

    Raises:
        ParallelError: A rank sees another one than rank 0.
    """
    for rank, opening in enumerate(openings):
        if opening != openings[0]:
            raise ParallelError(
                "ranks see different sources",
                found=f"rank {rank}: {'; '.join(list(_differences(openings[0], opening, ''))[:5])}",
                hint="give all ranks the same directory on a shared filesystem",
            )


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name} {key}")
    elif old != new:
        yield f"{name.strip()} was {old}, is {new}"


def is_made_already(target: Path, plan: Plan, checkpoint: Checkpoint, options: Mapping[str, Any], memory: int) -> bool:
    """Say whether `target` is the complete result of the same conversion, by its manifest and its files' sizes.

    Another model of the same shapes has the same headers, so the source is hashed, with at most `memory` bytes of
    buffers; not where a commit says what it is.

    Raises:
        StorageError: The disk refused.
        CheckpointFormatError: The source was cut off meanwhile.
    """
    try:
        manifest = read_manifest(target)
    except InputError:
        return False
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    source = {name: (file.size, file.header.digest) for name, file in checkpoint.files.items()}
    said = manifest["source"]["files"]
    with refusals("look at the target", target):
        whole = all((target / name).is_file() and (target / name).stat().st_size == sizes[name] for name in sizes)
    return (
        whole
        and manifest.get("plan") == plan_digest(plan)
        and {key: value for key, value in manifest.get("options", {}).items() if key in options} == options
        and {name: _size_and_header(file) for name, file in said.items()} == source
        and _is_count_of_overflows(manifest.get("overflowed"), plan)
        and ("commit" in options or _hashed(checkpoint, memory) == manifest["source"].get("tensors"))
    )


def _hashed(checkpoint: Checkpoint, memory: int) -> dict[str, Any]:
    tensors = checkpoint.tensors.values()
    return hashed_tensors(tensors, hash_extents(tensor_chunks(tensors), memory))


def _size_and_header(said: Any) -> tuple[Any, Any]:
    return (said.get("bytes"), said.get("header_sha256")) if isinstance(said, dict) else (None, None)


def _is_count_of_overflows(said: Any, plan: Plan) -> bool:
    """Say whether that part of a manifest, which is told once more, is what `convert` writes."""
    return isinstance(said, dict) and all(
        name in plan.tensors and type(count) is int and count > 0 for name, count in said.items()
    )


def true_chunks(known: Journalled, job: Job) -> set[Chunk]:
    """Return those journalled chunks of this rank's part whose bytes on the device are what the journal says.

    Raises:
        StorageError: The disk refused.
    """
    extents: dict[Chunk, Extent] = {}
    with ExitStack() as stack:
        for planned in job.plan.files:
            with refusals("look at the files", job.out):
                is_there = (job.out / planned.name).is_file()
            if known.target and is_there:
                file = stack.enter_context(OpenFile(job.out / planned.name))
                if file.size == planned.size:
                    extents |= file.chunks()
        mine = sorted(known.target.keys() & extents.keys())[job.ranks.rank :: job.ranks.world]
        found = hash_extents({chunk: extents[chunk] for chunk in mine}, job.memory.peak_bytes, buffered=job.buffered)
    return {chunk for chunk, digest in found.items() if digest == known.target[chunk]}
