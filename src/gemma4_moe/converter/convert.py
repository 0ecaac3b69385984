"""Convert a checkpoint on disk between the layouts: a plan, taken block by block through fixed buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.converter.blocks import DEFAULT_MEMORY
from gemma4_moe.converter.command import resume_command
from gemma4_moe.converter.conversion import Conversion, carry_out
from gemma4_moe.converter.request import Request
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.layout.table import Layout
    from gemma4_moe.sizes import Progress


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
            expert that folds to what the base's folds to gets the base's weights and scale. The base's side files fill
            in, but for its card. A complete target is then not known again by `resume`.
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
    given = locals()
    return carry_out(Request(**given), resume_command(convert, given))
