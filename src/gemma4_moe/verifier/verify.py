"""Verify a converted checkpoint: compute every tensor of it again from its source, and compare bits.

Neither the kernels nor the plan of the conversion are used. The expected tensors follow from `expectations`, their bits
from `reference`, so that no mistake of the converter can hide behind itself. Without a source, hashes are compared.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, overload

from gemma4_moe.checkpoint.blobs import check_blobs
from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.config_dtype import rewritten_config, with_dtype
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.recognition import layout_of, recognise, wrong_tensors
from gemma4_moe.checkpoint.scales import with_scales
from gemma4_moe.checkpoint.storage import open_regular, read_whole, refusals, regular_status
from gemma4_moe.errors import UsageError
from gemma4_moe.hub.source import check_streamed, locate, open_source
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.lora.opening import open_adapter
from gemma4_moe.sizes import parse_size
from gemma4_moe.target.manifest import Recheck, check_manifest
from gemma4_moe.target.recovery import check_published
from gemma4_moe.verifier.comparison import DEFAULT_MEMORY, Verification, by_current_name, compare, open_side
from gemma4_moe.verifier.differences import Difference
from gemma4_moe.verifier.expected import common_dtype, expectations
from gemma4_moe.verifier.merged import with_additions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.names import MoEName
    from gemma4_moe.layout.table import Layout
    from gemma4_moe.sizes import Progress

#: Bytes that are read of a side file at once.
_CHUNK = 2**20

#: The most bytes of buffers if an adapter's matrices are among them.
MERGED_MEMORY = 2**30


@overload
def verify(
    target: str | Path,
    /,
    *,
    revision: str | None = None,
    max_memory: int | str | None = ...,
    progress: Progress | None = ...,
) -> Recheck: ...


@overload
def verify(
    source: str | Path,
    target: str | Path,
    /,
    *,
    revision: str | None = None,
    stream: bool = ...,
    strip_wrappers: bool = ...,
    scale: str | None = ...,
    scale_from: str | Path | None = ...,
    config_from: str | Path | None = ...,
    adapter: str | Path | None = ...,
    max_memory: int | str | None = ...,
    progress: Progress | None = ...,
) -> Verification: ...


def verify(
    first: str | Path,
    second: str | Path | None = None,
    /,
    *,
    revision: str | None = None,
    stream: bool = False,
    strip_wrappers: bool = False,
    scale: str | None = None,
    scale_from: str | Path | None = None,
    config_from: str | Path | None = None,
    adapter: str | Path | None = None,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Verification | Recheck:
    """Compare every tensor of a target with its source's, computed again; or a target alone with its manifest.

    `verify(source, target)` compares bit by bit, from hf to nemo and from nemo to hf; or in one layout, if a target
    differs from its source in spelling, in its files, or as a base makes it. Floating-point tensors may have been cast,
    all to one dtype, unless a whole source is in the target's layout. To hf, an expert is right in two cases:
    `down_proj` has its bits, and the scale is the source's, or else one; or both fold to the native bits. Side files of
    the source must be in the target, byte for byte.

    With an adapter, a value is right if it is the rounding of a number that fp32 arithmetic may give (`merged`). What
    the adapter does not change is compared bit by bit.

    `verify(target)` compares the hashes of every file with those in `gemma4_moe.json`.

    Args:
        first: The source, or the target if there is no second argument: a directory, or a Hub id.
        second: The target, likewise.
        revision: Branch, tag or commit of the first argument, if it is a Hub id.
        stream: Read models on the Hub there, without a copy in the Hub's cache.
        strip_wrappers: Compare under the source's names without wrappers and doubled prefixes, as `convert` does.
        scale: "ones", if the source was converted so: see `convert`.
        scale_from: The checkpoint with the scales that the source has lost: see `convert`.
        config_from: The checkpoint whose config.json the target should have: see `convert`.
        adapter: The directory of the adapter that was merged into the target: the first argument is its base.
        max_memory: The most bytes of buffers, or text such as "512MiB"; by default 64 MiB, and 1 GiB with an adapter,
            whose matrices are part of it.
        progress: Called with the bytes that were compared so far and with their total.

    Returns:
        A `Verification` of a target with its source, a `Recheck` of a target alone.

    Raises:
        InputError: The source is not a checkpoint that can be converted, the target is not a checkpoint or has no
            manifest, its publish was interrupted, or a file in the Hub's cache is damaged.
        StorageError: The disk or its permissions refused.
        SourceChangedError: A file changed while it was read.
        UsageError: The memory budget is too small or no size; a directory was given a revision; a target alone was
            given an option that needs a source; or none of the checkpoints that are to be streamed is on the Hub.
    """
    memory = parse_size(max_memory or (DEFAULT_MEMORY if adapter is None else MERGED_MEMORY))
    if second is None:
        options = {"stream": stream, "strip-wrappers": strip_wrappers, "scale": scale, "scale-from": scale_from}
        options |= {"config-from": config_from, "adapter": adapter}
        if given_options := ", ".join(f"--{name}" for name, value in options.items() if value):
            hint = f"name SRC and DST, or leave {given_options} out"
            raise UsageError("a target alone is only hashed", file=first, found=given_options, hint=hint)
        alone = locate(first, revision)
        check_published(alone)
        return check_manifest(alone, max_memory=memory, progress=progress)
    if stream:
        check_streamed(first, second, scale_from)
    with ExitStack() as stack:
        opened = open_side(stack, first, revision, stream=stream)
        judged = open_side(stack, second, stream=stream)
        origin = None if scale_from is None else open_side(stack, scale_from, stream=stream)
        if config_from is not None:
            opened = opened.with_config_of(stack.enter_context(open_source(config_from)))
        given = opened.without_wrappers() if strip_wrappers else opened
        given = with_scales(given, scale, origin)
        check_blobs([*opened.files.values(), *judged.files.values()], memory)
        layout, names = _understand(given)
        to = layout_of(judged.tensors, judged.path)
        expected = expectations(given, names, layout, to)
        if adapter is not None:
            opened_adapter = stack.enter_context(open_adapter(expanded(adapter)))
            expected = with_additions(expected, opened_adapter, given, layout, to)
        found = by_current_name(judged, to)
        cast = common_dtype(expected, found) if layout is not to or given.in_parts or adapter is not None else None
        result = compare(given, judged, expected, found, cast=cast, max_memory=memory, progress=progress)
        wrong_files = _compare_side_files(given, judged, cast)
        return replace(result, different=(*result.different, *wrong_files), files=len(given.side_files))


def _understand(source: Checkpoint) -> tuple[Layout, dict[str, MoEName | None]]:
    """Return the source's layout and the meaning of its names; refuse a source that can't be converted."""
    config = source.read_config()
    inventory = Inventory(recognise(source.tensors, config).accepted(), config.sizes)
    for problem in wrong_tensors(source.tensors.values(), inventory, config):
        raise problem
    return inventory.layout, inventory.names


def _compare_side_files(source: Checkpoint, target: Checkpoint, cast: DType | None) -> Iterator[Difference]:
    """Yield the source's side files that the target lacks, or holds with other bytes.

    The config.json of a target whose tensors were cast names their dtype.
    """
    there = {path.name: path for path in target.side_files}
    for path in source.side_files:
        expected = f"{regular_status(path).st_size} bytes, as in the source"
        if path.name not in there:
            yield Difference(path.name, "file", expected, None)
        elif path.name == CONFIG_NAME and _is_rewritten(path, there[path.name], source, target, cast):
            continue
        elif path.name == CONFIG_NAME and cast is not None and _names_other_dtype(path, cast):
            yield Difference(path.name, "file", f"dtype {cast.name}, to which the tensors were cast", "another dtype")
        elif path.name == CONFIG_NAME and source.dequantised:
            yield Difference(path.name, "file", "the source's, without its quantization_config", "other bytes")
        elif (position := _first_other_byte(path, there[path.name])) is not None:
            size = regular_status(there[path.name]).st_size
            yield Difference(path.name, "file", expected, f"{size} bytes, the first that differs at {position}")


def _is_rewritten(config: Path, found: Path, source: Checkpoint, target: Checkpoint, cast: DType | None) -> bool:
    """Return whether a target's config.json is the source's, as `convert` rewrites it for the target's floats.

    These were dequantised, or cast to the one dtype that all of them have. Without a cast it may name any dtype.
    """
    dtypes = {tensor.dtype.name for tensor in target.tensors.values() if tensor.dtype.float_format is not None}
    may_be = [*([None] if cast is None else []), *(dtypes if len(dtypes) == 1 else [])]
    own = rewritten_config(found, None, dequantised=target.dequantised)
    return any(rewritten_config(config, dtype, dequantised=source.dequantised) == own for dtype in may_be)


def _names_other_dtype(config: Path, cast: DType) -> bool:
    raw = read_whole(config, LONGEST_CONFIG)
    return with_dtype(raw, cast.name) != raw


def _first_other_byte(one: Path, other: Path) -> int | None:
    """Return the position of the first byte that differs in two files, or None."""
    with (
        os.fdopen(open_regular(one), "rb") as left,
        os.fdopen(open_regular(other), "rb") as right,
        refusals("read the file", other),
    ):
        for position in count(0, _CHUNK):
            a, b = left.read(_CHUNK), right.read(_CHUNK)
            if a != b:
                differing = (at for at, (old, new) in enumerate(zip(a, b, strict=False)) if old != new)
                return position + next(differing, min(len(a), len(b)))
            if not a:
                break
    return None
