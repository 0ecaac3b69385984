"""How fast expert bytes move: ours beside a copy, torch, torch.compile and the peer's adapter, in one run.

    python benchmarks/kernels.py [--device cpu|cuda] [--experts 128] [--repeats 7] [--fresh-memory] [--json FILE]

Bandwidth counts bytes read plus bytes written. `share` is our bandwidth over that of a plain copy on the same device in
the same run: a copy of as many bytes, measured in turn with everything else. Every row alternates its contenders
and, where memory allows, two sets of inputs and outputs larger than any cache; the figures are medians, and `spread`
is the distance of the quartiles over the median. The peer is nemo-automodel 0.7.0, if it is installed.

On the CPU, results that are allocated anew come from memory that the process keeps, for every contender: fresh pages
from the system can take several times as long as the work. `--fresh-memory` measures with them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gemma4_moe import Gemma4MoEStateDictAdapter, kernels

H, I = 2816, 704  # noqa: E741  the real model's
SHAPES = {  # what each tensor of a layer looks like, in the layout that it comes from
    "gate_up hf→nemo": (2 * I, H),
    "gate_up nemo→hf": (H, 2 * I),
    "down hf→nemo": (H, I),
    "down nemo→hf": (I, H),
}
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
]
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}

Contender = Callable[[int], Any]  # takes the number of the round, to rotate inputs by


class Timer:
    """Runs contenders in turn, round after round, and times each."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def __call__(self, contenders: dict[str, Contender]) -> dict[str, list[float]]:
        """Return the seconds of each contender's rounds, after one round to warm up."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(-1, self.repeats):
            for name, contender in contenders.items():
                seconds = self._once(contender, turn)
                if turn >= 0:
                    times[name].append(seconds)
        return times

    def _once(self, contender: Contender, turn: int) -> float:
        if self.device.type == "cpu":
            started = time.perf_counter()
            contender(turn)
            return time.perf_counter() - started
        # What runs before the first event hides the time that the host takes to launch what is timed.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        contender(turn)
        begin.record()
        for step in range(4):
            contender(4 * turn + step)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 4e3


def spread(times: list[float]) -> float:
    """Return the distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ordinary numbers; one expert's, repeated, since drawing them all takes longer than the benchmark."""
    return torch.randn(shape[1:], device=device).to(dtype).expand(shape).contiguous()


def copying(nbytes: int, device: torch.device) -> Contender:
    """Return a contender that copies nbytes / 2, so that nbytes cross the bus, between two buffers beyond any cache."""
    size = min(nbytes // 2, 1 << 29)
    buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def copy(turn: int) -> None:
        for first in range(0, nbytes // 2, size):
            part = slice(0, min(size, nbytes // 2 - first))
            buffers[turn % 2][part].copy_(buffers[1 - turn % 2][part])

    return copy


def sets_that_fit(nbytes: int, device: torch.device) -> int:
    """Return 2, or 1 where two sets of inputs and outputs beside torch's intermediate results would fill the memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2 if 12 * nbytes < total else 1


def move_rows(E: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, pair of dtypes, and with or without the scale."""
    device = timer.device
    compiled = torch.compile(
        lambda x, scale, dtype: (x.float() * scale[:, None, None]).to(dtype).transpose(1, 2).contiguous(), dynamic=False
    )
    compiled_plain = torch.compile(lambda x, dtype: x.to(dtype).transpose(1, 2).contiguous(), dynamic=False)
    torch._dynamo.config.recompile_limit = 64  # one program a row
    scale = torch.rand(E, device=device) + 0.5
    for name, (R, C) in SHAPES.items():
        for source, target in PAIRS:
            nbytes = E * R * C * (source.itemsize + target.itemsize)
            sets = sets_that_fit(nbytes, device)
            xs = [random((E, R, C), source, device) for _ in range(sets)]
            outs = [torch.zeros(E, C, R, dtype=target, device=device) for _ in range(sets)]
            copy = copying(nbytes, device)
            for scaled in (False, True):
                factors = scale if scaled else None

                def ours(n, xs=xs, outs=outs, factors=factors):
                    kernels.transpose_scale_cast(xs[n % len(xs)], scale=factors, out=outs[n % len(xs)])

                def eager(n, xs=xs, target=target, scaled=scaled):
                    x = xs[n % len(xs)]
                    wide = x.float() * scale[:, None, None] if scaled else x
                    return wide.to(target).transpose(1, 2).contiguous()

                def fused(n, xs=xs, target=target, scaled=scaled):
                    x = xs[n % len(xs)]
                    return compiled(x, scale, target) if scaled else compiled_plain(x, target)

                times = timer({"copy": copy, "ours": ours, "torch": eager, "compile": fused})
                operation = f"{name}{' scaled' if scaled else ''}"
                yield row(operation, f"{SHORT[source]}→{SHORT[target]}", nbytes, times)
            del xs, outs, copy


def in_place_rows(E: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Yield a row for the multiplication of a native tensor in place, contiguous and through a transposed view."""
    scale = torch.tensor([1.0009765625, 0.9990234375], device=timer.device).repeat(E // 2 + 1)[:E]
    for view in ("contiguous", "transposed view"):
        xs = [random((E, I, H), torch.bfloat16, timer.device) for _ in range(2)]
        native = xs if view == "contiguous" else [x.transpose(1, 2) for x in xs]
        times = timer(
            {
                "copy": copying(2 * xs[0].nbytes, timer.device),
                "ours": lambda n, native=native: kernels.scale_in_place(native[n % 2], scale),
                "torch": lambda n, native=native: native[n % 2].mul_(scale[:, None, None]),
            }
        )
        yield row(f"scale_in_place, {view}", "bf16", 2 * xs[0].nbytes, times)


def row(operation: str, dtypes: str, nbytes: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return one line of the table: GB/s of each contender, our share of the copy, and how many times torch we are."""
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    return {
        "operation": operation,
        "dtypes": dtypes,
        "bytes": nbytes,
        "GB/s": {name: nbytes / seconds / 1e9 for name, seconds in medians.items()},
        "spread": {name: spread(measured) for name, measured in times.items()},
        "share": medians["copy"] / medians["ours"],
        "times torch": medians["torch"] / medians["ours"],
    }


def adapter_rows(E: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Yield a row for each call of the adapter's interface on one layer, ours beside the peer's."""
    device = timer.device
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    moe_config = SimpleNamespace(n_routed_experts=E, dim=H, moe_inter_dim=I)
    peer_class = peers_adapter()
    prefix = "model.language_model.layers.0."
    for target in (torch.float32, torch.bfloat16):
        hf = {
            prefix + "experts.gate_up_proj": random((E, 2 * I, H), torch.bfloat16, device),
            prefix + "experts.down_proj": random((E, H, I), torch.bfloat16, device),
            prefix + "router.per_expert_scale": (torch.rand(E, device=device) + 0.5).bfloat16(),
        }
        adapters = {"ours": Gemma4MoEStateDictAdapter(config, moe_config, None, dtype=target)}
        if peer_class is not None:
            adapters["peer"] = peer_class(config, moe_config, None, dtype=target)
        native = adapters["ours"].from_hf(hf)
        moved = {"from_hf": _nbytes(hf) + _nbytes(native), "to_hf": 2 * _nbytes(native)}
        gate_up, down = sorted(native, key=lambda name: "down" in name)
        calls: dict[str, tuple[int, Callable[[Any], Any]]] = {
            "from_hf": (moved["from_hf"], lambda adapter, hf=hf: _contiguous(adapter.from_hf(dict(hf)))),
            "to_hf": (moved["to_hf"], lambda adapter, native=native: _contiguous(adapter.to_hf(dict(native)))),
        }
        for part in (gate_up, down):
            calls[f"convert_single {part.rsplit('.', 1)[1]}"] = (
                2 * native[part].nbytes,
                lambda adapter, part=part, native=native: _contiguous(
                    dict(adapter.convert_single_tensor_to_hf(part, native[part]))
                ),
            )
        for call, (nbytes, function) in calls.items():
            contenders = {"copy": copying(nbytes, device)}
            for name, adapter in adapters.items():
                contenders[name] = lambda _, function=function, adapter=adapter: function(adapter)
            times = timer(contenders)
            medians = {name: statistics.median(measured) for name, measured in times.items()}
            yield {
                "operation": call,
                "dtypes": f"bf16→{SHORT[target]}" if call == "from_hf" else SHORT[target],
                "bytes": nbytes,
                "seconds": medians,
                "spread": {name: spread(measured) for name, measured in times.items()},
                "share": medians["copy"] / medians["ours"],
                "times peer": medians["peer"] / medians["ours"] if "peer" in medians else None,
            }


def whole_model_row(E: int, timer: Timer, layers: int = 30) -> dict[str, Any]:
    """Return the row for `to_hf` of all layers' experts: ours against a copy of the same tensors."""
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    adapter = Gemma4MoEStateDictAdapter(config, SimpleNamespace(n_routed_experts=E), None, dtype=torch.bfloat16)
    native = {}
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}.moe.experts."
        # One storage for all layers: what is measured is the reading, and a card holds one model, not two.
        if layer == 0:
            first = {
                "gate_and_up_projs": random((E, H, 2 * I), torch.bfloat16, timer.device),
                "down_projs": random((E, I, H), torch.bfloat16, timer.device),
            }
        native |= {prefix + part: tensor for part, tensor in first.items()}
    turns = count()

    def convert(_: int) -> None:
        for name, tensor in native.items():
            adapter.convert_single_tensor_to_hf(name, tensor)

    outs = [[torch.empty_like(tensor) for tensor in first.values()] for _ in range(2)]

    def copy(_: int) -> None:
        for _ in range(layers):
            for out, tensor in zip(outs[next(turns) % 2], first.values(), strict=True):
                out.copy_(tensor)

    timer = Timer(timer.device, max(3, timer.repeats // 2))
    times = timer({"copy": copy, "ours": convert})
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    return {
        "operation": f"to_hf, {layers} layers",
        "dtypes": "bf16",
        "bytes": 2 * layers * _nbytes(first),
        "seconds": medians,
        "spread": {name: spread(measured) for name, measured in times.items()},
        "share": medians["copy"] / medians["ours"],
        "times peer": None,
    }


def peers_adapter() -> Any:
    """Return the peer's adapter class, or None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from nemo_automodel.components.models.gemma4_moe import state_dict_adapter
        except ImportError as error:
            print(f"the peer is left out: {error}")
            return None
    return state_dict_adapter.Gemma4MoEStateDictAdapter


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def keep_memory() -> None:
    """Make glibc's malloc keep what is freed; other C libraries are left as they are."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
        name += f", {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "kernels": {name: found.detail for name, found in kernels.available().items()},
    }


def show_moves(rows: list[dict[str, Any]]) -> None:
    """Print the table of bandwidths."""
    columns = f"{'copy':>7} {'ours':>7} {'torch':>7} {'compile':>8}  {'share':>6} {'×torch':>7} {'spread':>7}"
    print(f"\n{'GB/s':31} {'':10} {columns}")
    for r in rows:
        speed = {name: f"{value:.1f}" for name, value in r["GB/s"].items()}
        print(
            f"{r['operation']:31} {r['dtypes']:10} {speed['copy']:>7} {speed['ours']:>7} {speed['torch']:>7} "
            f"{speed.get('compile', ''):>8}  {r['share']:6.2f} {r['times torch']:7.1f} {r['spread']['ours']:7.0%}",
            flush=True,
        )


def show_calls(rows: list[dict[str, Any]]) -> None:
    """Print the table of the adapter's calls."""
    columns = f"{'copy ms':>8} {'ours ms':>8} {'peer ms':>8}  {'share':>6} {'×peer':>6} {'spread':>7}"
    print(f"\n{'':32} {'':10} {columns}")
    for r in rows:
        ms = {name: f"{seconds * 1e3:.2f}" for name, seconds in r["seconds"].items()}
        times_peer = "" if r["times peer"] is None else f"{r['times peer']:.1f}"
        print(
            f"{r['operation']:32} {r['dtypes']:10} {ms['copy']:>8} {ms['ours']:>8} {ms.get('peer', ''):>8}  "
            f"{r['share']:6.2f} {times_peer:>6} {r['spread']['ours']:7.0%}",
            flush=True,
        )


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fresh-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    timer = Timer(device, options.repeats)
    if device.type == "cpu":
        if not options.fresh_memory:
            keep_memory()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    about = machine(device)
    print(json.dumps(about, indent=1, ensure_ascii=False))
    moves = [*move_rows(options.experts, timer), *in_place_rows(options.experts, timer)]
    show_moves(moves)
    calls = list(adapter_rows(options.experts, timer))
    if device.type == "cuda":
        calls.append(whole_model_row(options.experts, timer))
    show_calls(calls)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "moves": moves, "adapter": calls}, ensure_ascii=False))


if __name__ == "__main__":
    main()
