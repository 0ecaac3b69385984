"""What a benchmark on several ranks needs: the slowest rank's time, the limit of the wire, bits that all compare."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from timing import machine
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import ALL_GATHER, resident
from gemma4_moe.distributed.placements import as_bytes, local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: What the limit is called in every table.
LIMIT = "all-gather of the same bytes (limit)"

#: What the peer is called in every table.
PEER = "nemo-automodel 0.7.0"

#: The peer's round to warm up is its only one where it takes longer than this, in seconds.
LONG = 5.0


class Found(NamedTuple):
    """Seconds of the slowest rank in each run, and the most bytes that a rank held beyond what it held before."""

    seconds: list[float]
    extra_bytes: int

    @property
    def median(self) -> float:
        """Return the median of the seconds."""
        return statistics.median(self.seconds)


def start(kind: str) -> torch.device:
    """Join the ranks that torchrun has started, or be the only one, and return this rank's device."""
    where: dict[str, Any] = {}
    if not dist.is_torchelastic_launched():
        where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if kind == "cpu":
        dist.init_process_group("gloo", **where)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **where)  # NeMo's own choice
    return device


class Report:
    """Tables that the first rank prints as they come, and keeps for a JSON file.

    Args:
        device: This rank's device.
        layers: The model, in words.
    """

    def __init__(self, device: torch.device, layers: str) -> None:
        about = {key: value for key, value in machine(device).items() if key != "kernels"}
        wire = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.type == "cuda" else "gloo"
        about |= {"wire": wire, "ranks": dist.get_world_size(), "layers": layers}
        self.record: dict[str, Any] = about | {"rows": []}
        self._table = ""
        self.say("; ".join(f"{key}: {value}" for key, value in about.items()))

    def say(self, line: str) -> None:
        """Print a line."""
        if dist.get_rank() == 0:
            print(line, flush=True)

    def row(self, table: str, ranks: str, contender: str, found: Found, limit: Found, more: dict[str, Any]) -> None:
        """Print a row, before the first of a table its title; `more` are the columns that this table has besides."""
        if table != self._table:
            titles = ["ranks", "", "s", "min–max", "× limit", *more]
            self.say(f"\n## {table}\n\n| {' | '.join(titles)} |\n|---|---|{'--:|' * (len(titles) - 2)}")
            self._table = table
        spread = f"{min(found.seconds):.4f}–{max(found.seconds):.4f}"
        times = f"{found.median / limit.median:.2f}"
        cells = [ranks, contender, f"{found.median:.4f}", spread, times, *map(str, more.values())]
        self.say(f"| {' | '.join(cells)} |")
        self.record["rows"].append({"table": table, "ranks": ranks, "contender": contender} | found._asdict() | more)


def shared_directory(parent: Path) -> Path:
    """Return a new directory, the same on all ranks."""
    names = [tempfile.mkdtemp(dir=parent) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(str(names[0])).resolve()


def largest(number: int, device: torch.device) -> int:
    """Return the largest of the ranks' numbers."""
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Found]:
    """Run contenders in turn, after one round to warm up. All ranks must call.

    Args:
        contenders: What is timed, by name; one whose name starts with `PEER` counts once, see `LONG`.
        repeats: Rounds that count.
        device: This rank's device.
        prepare: Called before each run, outside of what is timed.
    """
    found = {name: Found([], 0) for name in contenders}
    for turn in range(-1, repeats):
        for name, contender in contenders.items():
            peers = name.startswith(PEER)
            if peers and found[name].seconds:
                continue
            prepare()
            before = _forget_peak(device)
            dist.barrier()
            _finish(device)
            start = time.perf_counter()
            result = contender()
            _finish(device)
            took = [time.perf_counter() - start, float(_peak(device) - before)]
            del result
            slowest = torch.tensor(took, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 0 or (peers and slowest[0] > LONG):
                found[name].seconds.append(float(slowest[0]))
                found[name] = Found(found[name].seconds, max(found[name].extra_bytes, int(slowest[1])))
    return found


def all_gather(tensors: Iterable[torch.Tensor], device: torch.device) -> Callable[[], Any]:
    """Return a contender that gathers as many bytes as the whole tensors have, one collective for each tensor."""
    world = dist.get_world_size()
    parts = [torch.zeros(-(-tensor.nbytes // world), dtype=torch.uint8, device=device) for tensor in tensors]

    def gather() -> list[torch.Tensor]:
        gathered = []
        for part in parts:
            whole = part.new_empty(len(part) * world)
            ALL_GATHER(whole, part)
            gathered.append(whole)
        return gathered

    return gather


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called inside of the `with` block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def require_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> int:
    """Compare this rank's tensors, bit by bit; raise on every rank, with the names, if some differ on any.

    Returns:
        How many tensors were compared.
    """
    different = [name for name in expected.keys() | found.keys() if not _equal(found.get(name), expected.get(name))]
    require_none(different)
    return len(expected)


def require_none(different: list[str]) -> None:
    """Raise on every rank if a tensor differs on any."""
    everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, sorted(different))
    assert not any(everyones), {rank: names for rank, names in enumerate(everyones) if names}


def _equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if found is None or expected is None or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(as_bytes(local_of(found)), as_bytes(local_of(expected).to(local_of(found).device)))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: torch.device) -> int:
    """Start to watch how much is held, and return how much is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
