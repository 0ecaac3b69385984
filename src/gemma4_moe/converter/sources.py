"""The checkpoints that a conversion reads: its source, its base, and the one that has the scales which it has lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.scales import with_scales
from gemma4_moe.hub.remote import download
from gemma4_moe.hub.source import open_source
from gemma4_moe.target.preconditions import check_place

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint


class Sources(NamedTuple):
    """Open checkpoints. `checkpoint` is the source, under the names and with the scales that were asked for."""

    checkpoint: Checkpoint
    base: Checkpoint | None
    scales: Checkpoint | None

    @property
    def opened(self) -> list[Checkpoint]:
        """All of them, the source first."""
        return [each for each in self if each is not None]

    def check_place(self, target: Path) -> None:
        """Check that none of them is the target, above or below it. Raises a UsageError."""
        for each in self.opened:
            check_place(target, each.path)

    def download(self, revision: str | None, told: Callable[[int], object]) -> None:
        """Download those that are on the Hub; `revision` is the source's. Raises what `hub.remote.download` raises.

        `told` is called with the bytes of each piece that has come.
        """
        for each in self.opened:
            download(each, revision if each is self.checkpoint else None, told)


def open_sources(
    stack: ExitStack,
    source: str | Path,
    revision: str | None,
    base: str | Path | None,
    *,
    in_place: bool,
    strip_wrappers: bool,
    scale: str | None,
    scale_from: str | Path | None,
    config_from: str | Path | None,
) -> Sources:
    """Open the checkpoints of a conversion, as `convert` names them, on a stack that closes them.

    If `in_place`, they are opened to be read on the Hub without a download.

    Raises:
        UsageError, InputError, StorageError: As `open_source`, `Checkpoint.without_wrappers` and `with_scales` do.
    """
    checkpoint = stack.enter_context(open_source(source, revision, stream=in_place))
    if config_from is not None:
        checkpoint = checkpoint.with_config_of(stack.enter_context(open_source(config_from)))
    named = checkpoint.without_wrappers() if strip_wrappers else checkpoint
    origin, scales = (
        None if each is None else stack.enter_context(open_source(each, stream=in_place)) for each in (base, scale_from)
    )
    return Sources(with_scales(named, scale, scales), origin, scales)
