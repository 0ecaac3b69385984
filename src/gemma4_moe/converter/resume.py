"""Whether a run may resume an earlier one: the facts of a conversion, as two runs can compare them."""

from __future__ import annotations

import json
from dataclasses import astuple
from itertools import islice
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from gemma4_moe.checkpoint.hashing import hash_extents
from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.checkpoint.values import is_document
from gemma4_moe.converter import blocks
from gemma4_moe.errors import InputError, ParallelError, UnfinishedRunError, command_line
from gemma4_moe.sizes import exact_size
from gemma4_moe.target.manifest import read_manifest
from gemma4_moe.target.pieces import Count
from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.sizes import Progress
    from gemma4_moe.target.journal import Journalled


def plan_digest(plan: Plan) -> str:
    """Return a hash of all that decides a plan's bytes but the values: names, places, shapes, dtypes, operations."""
    files = [(file.name, file.size, blake3(file.header).hexdigest()) for file in plan.files]
    tensors = []
    for name, tensor in plan.tensors.items():
        base = plan.bases[name].stored if name in plan.bases else ()
        change = [(c.module.name, c.scaling, c.fold) for c in (plan.changes.get(name),) if c is not None]
        tensors.append((tensor.name, tensor.operation, [*map(_place, tensor.stored)], *map(_place, base), *change))
    text = json.dumps([plan.source_layout, plan.target_layout, files, tensors])
    return blake3(text.encode()).hexdigest()


def _place(stored: StoredTensor) -> tuple[str, str, int, str]:
    return stored.name, stored.file.path.name, stored.start, stored.dtype.name


def opening_record(
    plan: Plan, checkpoint: Checkpoint, options: Mapping[str, Any], base: Checkpoint | None = None
) -> dict[str, Any]:
    """Return the first record of a journal. A run may resume another if theirs are the same."""
    return {
        "version": __version__,
        "block_bytes": blocks.BLOCK_BYTES,
        "plan": plan_digest(plan),
        "options": dict(options),
        "source": _identities(checkpoint),
    } | ({} if base is None else {"base": _identities(base)})


def _identities(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("bytes", "mtime_ns", "inode", "header_sha256")
    return {name: dict(zip(names, astuple(file.identity), strict=True)) for name, file in checkpoint.files.items()}


def check_same_run(known: Journalled, opening: Mapping[str, Any], command: str, target: Path) -> None:
    """Check that the journal belongs to the same conversion; an UnfinishedRunError names the differences.

    `command` is the command line that resumes this run.
    """
    if known.opening is None or known.opening == opening:
        return
    clean = command_line("gemma4-moe", "clean", target)
    raise UnfinishedRunError(
        "the run that was not finished is another one",
        file=target,
        found=_differences(known.opening, opening),
        hint=f"remove it: {clean}"
        if known.command in (None, command)  # then the source itself has changed
        else f"resume it as it was begun: {known.command}; or remove it: {clean}",
    )


def check_same_source(openings: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks see the same source and the same plan. Raises ParallelError."""
    for rank, opening in enumerate(openings):
        if opening != openings[0]:
            raise ParallelError(
                "ranks see different sources",
                found=f"rank {rank}: {_differences(openings[0], opening)}",
                hint="give all ranks the same directory on a shared filesystem",
            )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "; ".join(islice(_changes(old, new, ""), 5))


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name} {key}")
    elif old != new:
        yield f"{_label(name.strip())} was {_shown(name, old)}, is {_shown(name, new)}"


def _label(name: str) -> str:
    """Return the name of a fact as a user knows it: that of an option as it is typed."""
    option = name.removeprefix("options ")
    return name if option == name or " " in option else f"--{option.replace('_', '-')}"


def _shown(name: str, value: object) -> str:
    if value is None:
        return "not given"
    return exact_size(value) if name.endswith("max_shard_size") and isinstance(value, int) else str(value)


def is_made_already(
    target: Path, plan: Plan, checkpoint: Checkpoint, options: Mapping[str, Any], memory: int, progress: Progress | None
) -> bool:
    """Return whether `target` is the complete result of the same conversion, by its manifest and its files' sizes.

    Another model of the same shapes has the same headers, so the source is hashed, with at most `memory` bytes of
    buffers. A commit of the Hub makes that needless.
    """
    try:
        manifest = read_manifest(target)
    except InputError:
        return False
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    with refusals("look at the target", target):
        whole = all((target / name).is_file() and (target / name).stat().st_size == sizes[name] for name in sizes)
    said = manifest.get("source", {"files": {}})
    for file in said["files"].values():
        if isinstance(file, dict):
            file.pop("sha256", None)
    same = (
        whole
        and manifest.get("plan") == plan_digest(plan)
        and {key: value for key, value in manifest["options"].items() if key in options} == options
        and all(_is_count(manifest.get(counts), plan) for counts in ("overflowed", "given_back"))
        and is_document(manifest.get("values"))
        and said | {"blocks": {}} == described_source(plan, checkpoint, {})
    )
    if not same or "commit" in options:
        return same
    reading = [block for block in blocks.blocks(plan) if block.tensor.source is not None]
    groups = [block.source_extents() for block in reading]
    count = Count([sum(extent.end - extent.start for group in groups for extent in group)], progress)
    found = hash_extents(groups, memory, hashed=count)
    digests = {block.place: digest for block, digest in zip(reading, found, strict=True)}
    return bool(said == described_source(plan, checkpoint, digests))


def described_source(plan: Plan, checkpoint: Checkpoint, digests: Mapping[tuple[str, int, int], str]) -> dict[str, Any]:
    """Return the manifest's description of the source, without SHA-256; `digests` has each block's by its place."""
    found: dict[str, list[str]] = {}
    for block in blocks.blocks(plan):
        if block.place in digests:
            found.setdefault(block.tensor.name, []).append(digests[block.place])
    files = checkpoint.files.items()
    return {
        "layout": plan.source_layout,
        "spelling": plan.spelling,
        "files": {name: {"bytes": file.size, "header_sha256": file.identity.header_digest} for name, file in files},
        "block_bytes": blocks.BLOCK_BYTES,
        "blocks": {name: found[name] for name in plan.tensors if name in found},
    }


def _is_count(said: Any, plan: Plan) -> bool:
    """Return whether a part of a manifest, which a note repeats, is a count by tensors as `convert` writes it."""
    return isinstance(said, dict) and all(
        name in plan.tensors and type(count) is int and count > 0 for name, count in said.items()
    )
