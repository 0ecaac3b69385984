"""Ranks that have NeMo AutoModel imported already: that takes ten seconds or more, and so happens once for all tests.

A process of its own starts them, since the processes of one test session are forked from one server.
"""

from __future__ import annotations

import multiprocessing
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support import ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

_PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "gemma4_moe.integrations.nemo_automodel",
    "nemo_automodel.components.checkpoint.checkpointing",
    "nemo_automodel.components.distributed.mesh",
    "nemo_automodel.components.models.gemma4_moe.model",
    "nemo_automodel.components.moe.parallelizer",
]


@contextmanager
def starter() -> Iterator[Callable[..., None]]:
    """Give a function that does what `ranks.run` does."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()  # or the death of the process would not end a wait for its answer

    def run(world: int, function: Callable[..., None], *arguments: Any) -> None:
        ours.send((world, function, arguments))
        failure = ours.recv()
        assert failure is None, failure

    try:
        yield run
    finally:
        ours.send(None)
        process.join(30)
        process.kill()


def _serve(pipe: Connection) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    while (order := pipe.recv()) is not None:
        world, function, arguments = order
        try:
            ranks.run(world, function, *arguments)
        except Exception:  # noqa: BLE001 - brought back to the test, whatever it is
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
