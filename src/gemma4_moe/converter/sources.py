"""What a conversion reads: its source, its base, the checkpoint with the scales that it has lost, and an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.scales import with_scales
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.hub.remote import download
from gemma4_moe.hub.source import check_streamed, open_source
from gemma4_moe.lora.opening import open_adapter
from gemma4_moe.target.preconditions import check_place

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.request import Request
    from gemma4_moe.lora.opening import Adapter


class Sources(NamedTuple):
    """Open sources. `checkpoint` has the names and the scales that were asked for."""

    checkpoint: Checkpoint
    base: Checkpoint | None
    scales: Checkpoint | None
    adapter: Adapter | None

    @property
    def opened(self) -> list[Checkpoint]:
        """All checkpoints, the source first."""
        return [each for each in self[:3] if each is not None]

    def plan(self, request: Request) -> Plan:
        """Plan the conversion. Raises what `make_plan` raises."""
        return make_plan(
            self.checkpoint,
            to=request.to,
            dtype=request.dtype,
            max_shard_size=request.max_shard_size,
            base=self.base,
            adapter=self.adapter,
        )

    def check_place(self, target: Path) -> None:
        """Check that none of them is the target, above or below it. Raises a UsageError."""
        for path in [each.path for each in self if each is not None]:
            check_place(target, path)

    def check_unchanged(self) -> None:
        """Check that files are as they were opened. Raises what `SafetensorsFile.check_unchanged` raises."""
        for each in (self.checkpoint, self.base):
            if each is not None:
                each.check_unchanged()
        if self.adapter is not None:
            self.adapter.file.check_unchanged()

    def download(self, revision: str | None, told: Callable[[int], object]) -> None:
        """Download those that are on the Hub; `revision` is the source's. Raises what `hub.remote.download` raises.

        `told` is called with the bytes of each piece that has come.
        """
        for each in self.opened:
            download(each, revision if each is self.checkpoint else None, told)


def open_sources(stack: ExitStack, request: Request, *, in_place: bool) -> Sources:
    """Open the sources of a request on a stack that closes them.

    If `in_place`, they are opened to be read on the Hub without a download.

    Raises:
        UsageError, InputError, StorageError: As `check_streamed`, `open_source`, `Checkpoint.without_wrappers`,
            `with_scales` and `open_adapter` do.
    """
    if request.stream:
        check_streamed(request.source, request.base)
    checkpoint = stack.enter_context(open_source(request.source, request.revision, stream=in_place))
    if request.config_from is not None:
        checkpoint = checkpoint.with_config_of(stack.enter_context(open_source(request.config_from)))
    named = checkpoint.without_wrappers() if request.strip_wrappers else checkpoint
    origin, scales = (
        None if each is None else stack.enter_context(open_source(each, stream=in_place))
        for each in (request.base, request.scale_from)
    )
    adapter = None if request.adapter is None else stack.enter_context(open_adapter(expanded(request.adapter)))
    return Sources(with_scales(named, request.scale, scales), origin, scales, adapter)
