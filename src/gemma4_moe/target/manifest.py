"""`gemma4_moe.json`: what a converted directory says of how it came to be, and the hashes that it can be checked by.

It holds nothing that changes from run to run, no time and no path, so that equal conversions give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import Chunk, chunk_count
from gemma4_moe.checkpoint.index import is_bare_name
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.errors import CheckpointFormatError
from gemma4_moe.layout.dtypes import EXPERT_DTYPES, DType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.file import SafetensorsFile
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.scales import Scales
    from gemma4_moe.target.journal import Journalled, Overflows

MANIFEST_NAME = "gemma4_moe.json"

#: Raised when a reader of the old form would misunderstand the new one.
FORMAT = 1

#: The longest manifest that is read, in bytes. The real model's has about 0.4 MB.
LONGEST_MANIFEST = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Folded:
    """What a manifest says of a tensor that scales were folded into.

    Attributes:
        scale: The scale of each expert, as fp32 holds it.
        dtype: The dtype that the experts had before.
    """

    scale: tuple[float, ...]
    dtype: DType


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
    used = [tensor for planned in plan.tensors.values() for tensor in (planned.source, planned.scale) if tensor]
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


def hashed_tensors(tensors: Iterable[StoredTensor], hashes: Mapping[Chunk, str]) -> dict[str, Any]:
    """Return what a manifest says of the source's tensors: size in bytes and hashes, by their names."""
    return {
        tensor.name: {"bytes": tensor.nbytes, "blake3": _digests(hashes, tensor.name, tensor.nbytes)}
        for tensor in tensors
    }


def encode_manifest(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory that we wrote.

    Raises:
        CheckpointFormatError: There is none, it is not JSON, or one of another form.
        StorageError: The disk or its permissions refused.
    """
    path = directory / MANIFEST_NAME
    with refusals("look at the directory", directory):
        if directory.is_dir() and not path.exists():
            raise CheckpointFormatError(
                "the directory has no manifest: it was not made by gemma4-moe convert",
                file=directory,
                expected=MANIFEST_NAME,
                hint="compare it with its source: gemma4-moe verify SRC DST",
            )
    raw = read_whole(path, LONGEST_MANIFEST)
    try:
        document = json.loads(raw)
        known = (
            document["format"] == FORMAT
            and isinstance(document["source"]["files"], dict)
            and isinstance(document["options"], dict)
            and all(is_bare_name(name) and _is_hashed(file) for name, file in document["files"].items())
        )
        chunk_bytes = document["hashes"]["chunk_bytes"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(path, str(error)) from error
    if not known or chunk_bytes != hashing.CHUNK_BYTES:
        raise _foreign(path, f"format {document['format']!r}, chunks of {chunk_bytes!r} bytes")
    return dict(document)


def read_folded(directory: Path, experts: Mapping[str, int]) -> dict[str, Folded]:
    """Return what the manifest of a directory says of the scales that were folded into tensors; nothing without one.

    Nobody has to believe it: what can be made of it is for the bits of the tensors to show.

    Args:
        directory: The directory.
        experts: The number of experts of each tensor that may be asked about.

    Raises:
        CheckpointFormatError: There is a manifest that makes no sense, or that does not fit these tensors.
        StorageError: The disk or its permissions refused.
    """
    path = directory / MANIFEST_NAME
    with refusals("look at the directory", directory):
        if not path.exists():
            return {}
    raw = read_whole(path, LONGEST_MANIFEST)
    known = {dtype.name: dtype for dtype in EXPERT_DTYPES}
    try:
        document = json.loads(raw)
        scales, dtypes = document["folded_scales"], document["source_dtypes"]
        folded = {
            name: Folded(tuple(_read_number(value) for value in scales[name]), known[dtypes[name]])
            for name in experts.keys() & scales.keys()
        }
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _senseless(path, f"{type(error).__name__}: {error}") from error
    for name, said in folded.items():
        if len(said.scale) != experts[name]:
            raise _senseless(path, f"{len(said.scale)} scales for the {experts[name]} experts of {name}")
    return folded


def _is_hashed(file: Any) -> bool:
    size, digests = file["bytes"], file["blake3"]
    return type(size) is int and size >= 0 and isinstance(digests, list) and len(digests) == chunk_count(size)


def _foreign(path: Path, found: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        "not a manifest that this version reads",
        file=path,
        expected=f"format {FORMAT}, chunks of {hashing.CHUNK_BYTES} bytes",
        found=found,
        hint="check the directory against its source: gemma4-moe verify SRC DST",
    )


def _senseless(path: Path, found: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        "a manifest whose scales make no sense",
        file=path,
        expected="folded_scales, a list of a number for each expert, and source_dtypes, by the tensor's name",
        found=found,
        hint=f"get {MANIFEST_NAME} again, or move it away: then every scale becomes one",
    )


def _digests(hashes: Mapping[Chunk, str], name: str, size: int) -> list[str]:
    return [hashes[Chunk(name, number)] for number in range(chunk_count(size))]


def _overflowed(plan: Plan, overflows: Overflows) -> dict[str, int]:
    """Return how many finite values of each target tensor have become infinite, in the order of the plan."""
    counts: Counter[str] = Counter()
    for chunk in overflows.values():
        counts.update(chunk)
    return {name: counts[name] for name in plan.tensors if counts[name]}


def _number(value: float) -> float | str:
    """Return a number that JSON can hold: it has no NaN and no infinities."""
    return value if math.isfinite(value) else str(value)


def _read_number(value: Any) -> float:
    """Return the number that `_number` has written."""
    if type(value) is not float and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{value!r} is not a number that a manifest holds")
    return float(value)
