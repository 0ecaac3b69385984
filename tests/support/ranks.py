"""Run a function on several ranks, each a process of its own, and bring back what it raised."""

import multiprocessing
import os
import socket
import traceback
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver

_CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch.distributed.tensor", "gemma4_moe.adapter.state_dict_adapter"]
_CONTEXT.set_forkserver_preload(PRELOADED)


def run(world, function, *arguments, seconds=120, meet_at_end=True, backend="gloo"):
    """Call the function on `world` ranks, of which none is lost if they `meet_at_end`; raise what they raise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = _CONTEXT.SimpleQueue()
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, world, port, backend, results, function, arguments, meet_at_end))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    failures = []
    while not results.empty():
        failures.append(results.get())
    assert not failures, "\n".join(failures)
    assert not hung, f"ranks {hung} did not end within {seconds} s"
    assert [process.exitcode for process in processes] == [0] * world


def _rank(rank, world, port, backend, results, function, arguments, meet_at_end):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    where = {}
    if backend == "nccl":
        torch.cuda.set_device(rank)
        where["device_id"] = torch.device("cuda", rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=60), **where)
    try:
        function(*arguments)
        if meet_at_end:
            dist.barrier()  # the first rank holds the store that the others may still be asking
    except BaseException:  # noqa: BLE001 - brought back to the test, whatever it is
        results.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    if meet_at_end:
        dist.destroy_process_group()


@contextmanager
def preloading(*modules):
    """Let ranks begin with these modules imported, too: a new server is started, of which they are forked."""
    server = forkserver._forkserver
    server._stop()
    _CONTEXT.set_forkserver_preload([*PRELOADED, *modules])
    try:
        yield
    finally:
        server._stop()
        _CONTEXT.set_forkserver_preload(PRELOADED)
