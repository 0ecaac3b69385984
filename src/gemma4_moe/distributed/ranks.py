"""Ranks that write one target together; if one rank fails, all stop.

Without a process group there is one rank, which waits for nobody. torch is imported only if a group exists, so that the
converter runs alone without it.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import ParallelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


class LostRankError(ParallelError):
    """A collective failed: ranks can't even tell each other how the work ended."""


@contextmanager
def failing_in_words(action: str) -> Iterator[None]:
    """Turn a failed collective into a ParallelError that names the logs to read."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"ranks could not {action}: {str(error).splitlines()[0]}",
            expected="every rank to take part",
            hint="read the first error in the logs of the other ranks: one failed, was killed or did not call",
        ) from error


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the ranks that work together.

    Attributes:
        rank: Its number among them.
        world: How many they are.
        group: Their process group; None for torch's default one, or for a single rank.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank does the work that only one rank may do."""
        return self.rank == 0

    def everyones(self, value: Any) -> list[Any]:
        """Return each rank's value, in the order of ranks. All ranks must call."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with failing_in_words("meet"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def of_world(self, rank: int) -> int:
        """Return the number that a rank of these has in torch's default process group."""
        if self.group is None:
            return rank
        import torch.distributed as dist

        return dist.get_global_rank(self.group, rank)

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Run a `with` block on every rank; if one fails, the others raise a ParallelError.

        `action` is a verb with its object for that error: "write its tensors".
        """
        failure: Exception | None = None
        try:
            yield
        except LostRankError:
            raise
        except Exception as error:  # noqa: BLE001 - the other ranks must not wait for this one; it is raised below
            failure = error
        messages = self.everyones(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                found = message.replace("\n", ";")
                problem = f"rank {self.of_world(rank)} could not {action}"
                raise ParallelError(problem, found=found, hint="read that rank's log")


def launched_as_one_of_several() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started several processes."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def ranks_on_this_host() -> int:
    """Return the number of ranks that share this host's cores; 1 without a launcher."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def under_torchrun() -> Iterator[Ranks]:
    """Join the other ranks that torchrun started, if any, for a `with` block."""
    if not launched_as_one_of_several():
        yield current()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield current()
    finally:
        dist.destroy_process_group()


#: How long a rank waits for another: the slowest share of a large checkpoint may take this much longer than others.
_PATIENCE = timedelta(hours=1)


def current() -> Ranks:
    """Return the ranks of torch's default process group; a single rank if none is initialised."""
    if "torch.distributed" not in sys.modules:
        return Ranks()
    import torch.distributed as dist

    started = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size()) if started else Ranks()


def members_of(group: Any) -> Ranks:
    """Return the ranks of a process group.

    Raises:
        UsageError: This process is not in it.
    """
    import torch.distributed as dist

    if (rank := dist.get_rank(group)) < 0:
        hint = "give each rank the group that it is in, such as mesh.get_group()"
        raise UsageError("this rank is not in the process group", hint=hint)
    return Ranks(rank, dist.get_world_size(group), group)
