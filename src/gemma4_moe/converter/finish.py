"""Finish a conversion whose weights are written: hashes, all that is not weights, the manifest, and the read-back."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import (
    Chunk,
    OpenFile,
    bytes_hash,
    chunk_bounds,
    hash_extents,
    sha256,
    tensor_chunks,
)
from gemma4_moe.checkpoint.side_files import MANIFEST_NAME
from gemma4_moe.checkpoint.storage import refusals, sync_directory, write_file
from gemma4_moe.converter.resume import plan_digest
from gemma4_moe.errors import StorageError
from gemma4_moe.target.journal import read_journals
from gemma4_moe.target.manifest import FORMAT, _digests, encode_manifest, hashed_tensors, read_manifest, wrong_files
from gemma4_moe.target.transaction import copy_side_files, write_index_file
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.checkpoint.file import SafetensorsFile
    from gemma4_moe.checkpoint.hashing import Chunk
    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.scales import Scales
    from gemma4_moe.target.journal import Journalled, Overflows


def finish(job: Job) -> None:
    """Write what the target needs besides its weights, and check all that is on the device. All ranks must call.

    Raises:
        StorageError: The disk or its permissions refused, or gave back other bytes than were written.
        ParallelError: Another rank failed.
    """
    with job.ranks.together("hash the source"):
        hashes = read_journals(job.control)
        own = _missing_source_hashes(job, hashes)
    for part in job.ranks.everyones(own):
        hashes.source.update(part)
    manifest = b""
    with job.ranks.together("write the manifest"):
        if job.ranks.is_first:
            copy_side_files(job.checkpoint.side_files, job.out)
            write_index_file({file.name: file.entries for file in job.plan.files}, job.out)
            manifest = encode_manifest(_manifest(job, hashes))
            write_file(job.out / MANIFEST_NAME, manifest)
            sync_directory(job.out)
    if job.read_back:
        with job.ranks.together("read back what was written"):
            _read_back(job, manifest)


def _missing_source_hashes(job: Job, hashes: Journalled) -> dict[Chunk, str]:
    """Hash this rank's part of the source's chunks that no rank has read in one go: scales, and where shares meet."""
    tensors = [tensor for planned in job.plan.tensors.values() for tensor in planned.stored]
    extents = tensor_chunks(tensors)
    missing = sorted(extents.keys() - hashes.source.keys())[job.ranks.rank :: job.ranks.world]
    return hash_extents({chunk: extents[chunk] for chunk in missing}, job.memory.peak_bytes, buffered=job.buffered)


def _manifest(job: Job, hashes: Journalled) -> dict[str, Any]:
    options = job.options | {"to": job.plan.target_layout, "read_back": job.read_back}
    document = build_manifest(
        job.plan,
        job.checkpoint.files,
        job.scales,
        hashes,
        _beside(job),
        gemma4_moe=__version__,
        plan_digest=plan_digest(job.plan),
        options=options,
    )
    if job.sha256:
        with ExitStack() as stack:
            written = {name: stack.enter_context(OpenFile(job.out / name)) for name in document["files"]}
            for said, files in ((document["files"], written), (document["source"]["files"], job.checkpoint.files)):
                for name, digest in sha256(files, job.memory.peak_bytes, buffered=job.buffered).items():
                    said[name]["sha256"] = digest
    return document


def _beside(job: Job) -> dict[str, Any]:
    """Return size and hashes of each file in `out` that holds no weights."""
    weights = {file.name for file in job.plan.files}
    said = {}
    with ExitStack() as stack:
        with refusals("list the directory", job.out):
            paths = sorted(job.out.iterdir())
        for path in paths:
            if path.name not in weights:
                file = stack.enter_context(OpenFile(path))
                digests = hash_extents(file.chunks(), job.memory.peak_bytes, buffered=True)
                said[path.name] = {"bytes": file.size, "blake3": list(digests.values())}
    return said


def _read_back_manifest(job: Job, written: bytes) -> None:
    """Compare the manifest, whose bytes no hash stands for."""
    with OpenFile(job.out / MANIFEST_NAME) as file:
        found = hash_extents(file.chunks(), job.memory.peak_bytes, buffered=job.buffered)
    wanted = {chunk: bytes_hash(written[slice(*chunk_bounds(chunk.number, len(written)))]) for chunk in found}
    if found != wanted:
        raise _other_bytes(job, MANIFEST_NAME)


def _read_back(job: Job, manifest: bytes) -> None:
    """Compare this rank's part of what is on the device with its hashes, and the manifest with what was written."""
    if job.ranks.is_first:
        _read_back_manifest(job, manifest)
    files = read_manifest(job.out)["files"]
    wrong = wrong_files(
        job.out, files, job.memory.peak_bytes, buffered=job.buffered, part=job.ranks.rank, parts=job.ranks.world
    )
    if wrong:
        raise _other_bytes(job, "; ".join(wrong[:5]))


def _other_bytes(job: Job, found: str) -> StorageError:
    return StorageError(
        "the disk gives back other bytes than were written",
        file=job.out,
        found=found,
        hint="check the disk and the memory; --resume writes again what is wrong",
    )


def build_manifest(
    plan: Plan,
    sources: Mapping[str, SafetensorsFile],
    scales: Scales,
    hashes: Journalled,
    beside: Mapping[str, Any],
    *,
    plan_digest: str,
    **facts: Any,
) -> dict[str, Any]:
    """Return the manifest of a conversion.

    Args:
        plan: What was done.
        sources: The source's safetensors files by name.
        scales: For each target tensor that a scale was folded into, the scale [E], fp32.
        hashes: The hash of each chunk of the target's weight files and of the source's tensors, and what overflowed.
        beside: What is said of each file of the target that holds no weights.
        plan_digest: The plan's hash.
        facts: What the caller has to say besides: versions, options.
    """
    used = [tensor for planned in plan.tensors.values() for tensor in planned.stored]
    return {
        "format": FORMAT,
        **facts,
        "plan": plan_digest,
        "hashes": {"algorithm": "blake3", "chunk_bytes": hashing.CHUNK_BYTES},
        "layout": plan.target_layout,
        "files": {
            file.name: {"bytes": file.size, "blake3": _digests(hashes.target, file.name, file.size)}
            for file in plan.files
        }
        | dict(beside),
        "source": {
            "layout": plan.source_layout,
            "spelling": plan.spelling,
            "files": {
                name: {"bytes": file.size, "header_sha256": file.header.digest} for name, file in sources.items()
            },
            "tensors": hashed_tensors(sorted(used, key=lambda tensor: tensor.name), hashes.source),
        },
        "source_dtypes": {
            tensor.name: tensor.source.dtype.name for tensor in plan.tensors.values() if tensor.source is not None
        },
        "overflowed": _overflowed(plan, hashes.overflows),
        "folded_scales": {name: [_number(value) for value in scale.tolist()] for name, scale in scales.items()},
    }


def _overflowed(plan: Plan, overflows: Overflows) -> dict[str, int]:
    """Return how many finite values of each target tensor have become infinite, in the order of the plan."""
    counts: Counter[str] = Counter()
    for chunk in overflows.values():
        counts.update(chunk)
    return {name: counts[name] for name in plan.tensors if counts[name]}


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinities."""
    return value if math.isfinite(value) else str(value)
