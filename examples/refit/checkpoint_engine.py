"""Hand a weight stream to MoonshotAI's checkpoint-engine, which broadcasts it into running engines.

    torchrun --nproc-per-node 8 examples/refit/checkpoint_engine.py NATIVE_STATE.pt

Needs the package `checkpoint-engine` and its update endpoint in the engine; see its own documentation for `req_func`.
Each rank registers the tensors that it brings, in pinned host memory: here, every `world`-th tensor of the stream.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

from gemma4_moe import WeightStream

if TYPE_CHECKING:
    from collections.abc import Callable


def register(stream: WeightStream, name: str, update: Callable[[list[tuple[str, str]]], None]) -> None:
    """Register one pass of a stream under `name`, and bring it into the engines."""
    from checkpoint_engine.ps import ParameterServer

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    server = ParameterServer(auto_pg=True)
    mine = {hf: tensor.cpu() for number, (hf, tensor) in enumerate(stream) if number % world == rank}
    server.init_process_group()
    server.register_checkpoint(name, files=[], named_tensors=mine)
    server.gather_metas(name)
    server.update(name, update)
    server.unregister_checkpoint(name)


def main() -> None:
    state = torch.load(sys.argv[1], mmap=True, weights_only=True)
    stream = WeightStream(state, dtype="bfloat16")
    register(stream, "policy", update=lambda sockets: print("the engine is to read from", sockets))


if __name__ == "__main__":
    main()
