"""A trainer process and an engine process on one machine: after every step the engine gets the policy's weights.

    python examples/refit/trainer_and_engine.py                     # CPU, broadcast over gloo
    python examples/refit/trainer_and_engine.py --transport ipc     # shared memory; with --device cuda, CUDA IPC

The engine stands for anything with `load_weights(iterable of (name, tensor))`, as vLLM's and SGLang's models have it.
After each step both processes hash what they have, in the engine's layout, and the trainer compares.
"""

from __future__ import annotations

import argparse
import hashlib
import socket
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gemma4_moe import WeightStream
from gemma4_moe.refit import broadcasting, ipc

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

E, H, I = 8, 160, 48  # noqa: E741
TRAINER, ENGINE = 0, 1


class Engine:
    """Keeps a copy of what it is sent, as an engine copies into its own parameters."""

    def __init__(self, names_and_shapes: Iterable[Any], device: str) -> None:
        self.weights = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, shape, dtype, _ in names_and_shapes
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy each tensor to its place."""
        for name, tensor in weights:
            self.weights[name].copy_(tensor)


def native_model(device: str, layers: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, H)}
    for layer in range(layers):
        path = f"model.layers.{layer}."
        shapes[path + "moe.experts.gate_and_up_projs"] = (E, H, 2 * I)
        shapes[path + "moe.experts.down_projs"] = (E, I, H)
        shapes[path + "moe.gate.proj.weight"] = (E, H)
        shapes[path + "moe.gate.scale"] = (H,)
        shapes[path + "layer_scalar"] = (1,)
    return {name: torch.randn(shape, generator=generator).to(device, torch.bfloat16) for name, shape in shapes.items()}


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def engine_main(options: argparse.Namespace, connection: Connection) -> None:
    join(ENGINE, options)
    engine = Engine(connection.recv(), options.device)
    connection.send("ready")
    for _ in range(options.steps):
        if options.transport == "ipc":
            receiving = ipc.receive(connection)
        else:
            receiving = broadcasting.receive(TRAINER, device=options.device)
        with receiving as tensors:  # an error in this block ends the pass in the trainer, too
            engine.load_weights(tensors)
        connection.send(digest(engine.weights.items()))
    leave()


def trainer_main(options: argparse.Namespace, connection: Connection) -> None:
    join(TRAINER, options)
    model = native_model(options.device, options.layers)
    stream = WeightStream(model, bucket_bytes=2**20)
    connection.send(stream.plan())
    connection.recv()
    for step in range(options.steps):
        for tensor in model.values():  # what an optimizer would do
            tensor.mul_(0.5).add_(0.25)
        start = time.perf_counter()
        if options.transport == "ipc":
            ipc.send(stream, connection)
        else:
            broadcasting.send(stream)
        seconds = time.perf_counter() - start
        same = connection.recv() == digest(stream)
        print(f"step {step}: {len(stream.plan())} tensors in {seconds:.3f} s, bits {'equal' if same else 'DIFFER'}")
        if not same:
            raise SystemExit(1)
    leave()


def join(rank: int, options: argparse.Namespace) -> None:
    if options.transport == "broadcast":
        where = f"tcp://127.0.0.1:{options.port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)


def leave() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--transport", choices=["broadcast", "ipc"], default="broadcast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options.port = free.getsockname()[1]
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    engine = context.Process(target=engine_main, args=(options, there))
    engine.start()
    trainer_main(options, here)
    engine.join()
    raise SystemExit(engine.exitcode)


if __name__ == "__main__":
    main()
