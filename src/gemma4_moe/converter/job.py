"""One conversion as all its parts see it: source, plan, target, means, ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.converter.blocks import Memory
    from gemma4_moe.converter.plan import Plan
    from gemma4_moe.converter.scales import Scales
    from gemma4_moe.target.directory import TargetFiles


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that has begun.

    Attributes:
        checkpoint: The source, open.
        base: The base, open, or None.
        plan: The plan.
        scales: The scales that are folded, by the target tensor's name.
        options: The options that decide the bytes of the target.
        target: The directory that is to appear.
        files: Its files, in the directory where they are written, with the ranks that write them.
        memory: The buffers of each rank.
        workers: Threads of the kernel.
        read_back: Whether to read the files back before they are published.
        sha256: Whether SHA-256 is wanted too.
    """

    checkpoint: Checkpoint
    base: Checkpoint | None
    plan: Plan
    scales: Scales
    options: dict[str, Any]
    target: Path
    files: TargetFiles
    memory: Memory
    workers: int
    read_back: bool
    sha256: bool

    def check_unchanged(self) -> None:
        """Check that source and base are as they were opened. Raises what `Checkpoint.check_unchanged` raises."""
        for checkpoint in (self.checkpoint, self.base):
            if checkpoint is not None:
                checkpoint.check_unchanged()

    @property
    def control(self) -> Path:
        """The directory of the lock and the journals."""
        return self.files.out.parent
