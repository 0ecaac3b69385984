"""The arguments of a conversion or of a merge, as the public functions have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.converter.blocks import DEFAULT_MEMORY
from gemma4_moe.target.file_layout import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.layout.table import Layout
    from gemma4_moe.sizes import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversion. `adapter` is the argument of `merge`, whose base is the `source` here; see `convert` for others.

    `plan` has no use for the arguments that say how a target is written.
    """

    source: str | Path
    target: str | Path | None
    to: Layout | str | None = None
    dtype: str = "keep"
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    max_memory: int | str = DEFAULT_MEMORY
    workers: int | None = None
    buffered: bool = False
    read_back: bool = True
    sha256: bool = False
    overwrite: bool = False
    resume: bool = False
    break_lock: bool = False
    revision: str | None = None
    stream: bool = False
    base: str | Path | None = None
    strip_wrappers: bool = False
    scale: str | None = None
    scale_from: str | Path | None = None
    config_from: str | Path | None = None
    card: bool = False
    adapter: str | Path | None = None
    progress: Progress | None = None
