"""Finish a conversion whose weights are written: the manifest, all other files, and the read-back."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.hashing import Extent, hash_extents
from gemma4_moe.converter.resume import described_source, plan_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma4_moe.converter.job import Job
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.target.pieces import Piece


def finish(job: Job, pieces: Sequence[Piece]) -> None:
    """Write all files but the weights, and read every file back. All ranks must call.

    Args:
        job: The job.
        pieces: The pieces of all blocks.

    Raises:
        StorageError: The disk or its permissions refused, or gave back other bytes than were written.
        ParallelError: Another rank failed.
    """
    own = pieces if job.files.ranks.is_first else ()
    written = job.files.complete(own, job.checkpoint.side_files, lambda files: _manifest(job, files, pieces))
    if job.read_back:
        job.files.read_back(written)


def _manifest(job: Job, files: dict[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the manifest without the files, and add SHA-256 to `files`."""
    plan = job.plan
    digests = {piece.place: piece.facts["source"] for piece in pieces if "source" in piece.facts}
    source = described_source(plan, job.checkpoint, digests)
    if job.sha256:
        with ExitStack() as stack:
            written = [stack.enter_context(OpenFile(job.files.out / name)) for name in files]
            opened: list[OpenFile] = [*written, *job.checkpoint.files.values()]
            whole = [(Extent(file, 0, file.size),) for file in opened]
            found = hash_extents(whole, job.memory.peak_bytes, buffered=job.files.buffered, algorithm=hashlib.sha256)
        for said, digest in zip([*files.values(), *source["files"].values()], found, strict=True):
            said["sha256"] = digest
    return {
        "plan": plan_digest(plan),
        "options": job.options | {"to": plan.target_layout, "read_back": job.read_back},
        "layout": plan.target_layout,
        "source": source,
        "source_dtypes": {
            tensor.name: tensor.source.dtype.name for tensor in plan.tensors.values() if tensor.source is not None
        },
        "overflowed": _counts(plan, [(piece, piece.facts.get("overflowed", 0)) for piece in pieces]),
        "given_back": _counts(plan, [(piece, len(piece.facts.get("given_back", ()))) for piece in pieces]),
        "folded_scales": {
            name: [_number(float(value)) for value in scale.tolist()] for name, scale in job.scales.items()
        },
    }


def _counts(plan: Plan, counted: Sequence[tuple[Piece, int]]) -> dict[str, int]:
    """Return the sum of counts for each tensor that has one, in the order of the plan."""
    counts: dict[str, int] = {}
    for piece, count in counted:
        if count:
            counts[piece.facts["tensor"]] = counts.get(piece.facts["tensor"], 0) + count
    return {name: counts[name] for name in plan.tensors if name in counts}


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinities."""
    return value if math.isfinite(value) else str(value)
