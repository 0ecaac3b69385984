"""Merge a LoRA adapter into a checkpoint on disk: a conversion whose values have a change added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.converter.blocks import DEFAULT_MEMORY
from gemma4_moe.converter.command import resume_command
from gemma4_moe.converter.conversion import Conversion, carry_out
from gemma4_moe.converter.request import Request
from gemma4_moe.layout.table import Layout
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.sizes import Progress


def merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    to: Layout | str = Layout.HF,
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
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint `base` with an adapter merged into it as the new directory `target`.

    A value is the base's, times its expert's scale where it is folded, plus scaling · B · A: in fp32, rounded once to
    the target's dtype. A weight or an expert that the adapter does not change is converted as `convert` does it. Runs
    that fail, and `resume`, are as with `convert`.

    Args:
        base: A directory of safetensors files with its config.json in either layout, or a Hub id.
        adapter: A directory with adapter_model.safetensors and adapter_config.json, in NeMo's, PEFT's or vLLM's form.
            Of a base in the nemo layout no scales are known: its adapter of `down` must be in NeMo's form.
        target: A directory that does not exist yet, or is empty.
        to: The layout of the target.
        dtype: See `convert`.
        max_shard_size: See `convert`.
        max_memory: See `convert`; the matrices of one or two changed weights are part of it.
        workers: See `convert`.
        buffered: See `convert`.
        read_back: See `convert`.
        sha256: See `convert`.
        overwrite: See `convert`.
        resume: See `convert`.
        break_lock: See `convert`.
        revision: Branch, tag or commit of a Hub id.
        stream: See `convert`.
        progress: See `convert`.

    Raises:
        InputError: Base or adapter can't be read, or they don't fit each other; a change is not finite, or a scale is
            zero by which B must be divided; nothing was written.
        UsageError, StorageError, TargetBusyError, SourceChangedError, ParallelError: As `convert` raises them.
    """
    given = locals()
    request = {name: value for name, value in given.items() if name != "base"}
    return carry_out(Request(source=base, **request), resume_command(merge, given))
