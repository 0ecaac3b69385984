"""Ranks that write one target together: who they are, and a meeting point at which a failure of one stops all.

Without a process group there is one rank and nothing to meet. torch is imported only where a group exists, so that the
converter runs alone without it.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import ParallelError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a run.

    Attributes:
        rank: This process' number.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    def everyones(self, value: Any) -> list[Any]:
        """Return what each rank gave, in the order of ranks. All must call.

        Raises:
            ParallelError: Another rank does not answer.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ParallelError(
                f"ranks could not meet: {str(error).splitlines()[0]}",
                expected=f"{self.world} ranks",
                hint="another rank was killed or has left: look at the first error in the logs of the other ranks",
            ) from error
        return values

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Do something on every rank and meet at its end; where one fails, all fail.

        Raises:
            ParallelError: Another rank failed; its own error is raised on that rank.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for it; it is raised below
            failure = error
        said = self.everyones(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, words in enumerate(said):
            if words is not None:
                raise ParallelError(f"rank {rank} could not {action}", found=words.replace("\n", ";"), hint=_LOOK)


def launched_as_one_of_several() -> bool:
    """Say whether torchrun, or a launcher that sets the same variables, has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def ranks_on_this_host() -> int:
    """Return how many ranks the launcher has started on this host, which share its cores; one without a launcher."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def under_torchrun() -> Iterator[Ranks]:
    """Join the other ranks where torchrun has started this process as one of several; otherwise there is one rank."""
    if not launched_as_one_of_several():
        yield current()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield current()
    finally:
        dist.destroy_process_group()


#: How long a rank waits for another: as long as the slowest share of a large checkpoint may take longer than others.
_PATIENCE = timedelta(hours=1)

_LOOK = "look at that rank's log"


def current() -> Ranks:
    """Return the ranks of torch's default process group, or a single one where none is initialised."""
    if "torch.distributed" not in sys.modules:
        return Ranks()
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())
