"""How fast expert bytes move: ours beside a copy, torch, torch.compile and the peer's adapter, in one run.

    python benchmarks/kernels.py [--device cpu|cuda] [--rows move,in-place,adapter] [--dtypes bf16:bf16,bf16:fp32,...]
                                 [--experts 128] [--rounds 15] [--fresh-memory] [--json FILE]

Bandwidth counts bytes read plus bytes written. Every round measures a copy of as many bytes, ours, and the copy again;
every fourth measures the others too. `share` is the copy's time over ours in the same round, so that a machine that
grows slower or faster changes nothing: the median of the rounds, and the quartiles. Where memory allows, two sets of
inputs and outputs larger than any cache take turns. The peer is nemo-automodel 0.7.0, if it is installed.

Copy and `transpose_scale_cast` write into tensors that exist. torch, torch.compile and both adapters allocate their
results. On the CPU these come from memory that the process keeps, for every contender, since fresh pages from the
system can take several times as long as the work. `--fresh-memory` leaves malloc as it is, as most programs do.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from timing import Measured, Timer, copying, give_back_memory, keep_memory, machine, random, sets_that_fit

from gemma4_moe import Gemma4MoEStateDictAdapter, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

H, I = 2816, 704  # noqa: E741  the real model's
SHAPES = {  # each tensor of a layer in the layout of the source
    "gate_up hf→nemo": (2 * I, H),
    "gate_up nemo→hf": (H, 2 * I),
    "down hf→nemo": (H, I),
    "down nemo→hf": (I, H),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
Pair = tuple[torch.dtype, torch.dtype]
PAIRS: list[Pair] = [(source, target) for source in DTYPES.values() for target in DTYPES.values()]


def move_rows(E: int, timer: Timer, pairs: list[Pair]) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, pair of dtypes, and with or without the scale."""
    device = timer.device
    compiled = torch.compile(
        lambda x, scale, dtype: (x.float() * scale[:, None, None]).to(dtype).transpose(1, 2).contiguous(), dynamic=False
    )
    compiled_plain = torch.compile(lambda x, dtype: x.to(dtype).transpose(1, 2).contiguous(), dynamic=False)
    torch._dynamo.config.recompile_limit = 64  # one program a row
    scale = torch.rand(E, device=device) + 0.5
    for name, (R, C) in SHAPES.items():
        for source, target in pairs:
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

                measured = timer(copy, ours, torch=eager, compile=fused)
                operation = f"{name}{' scaled' if scaled else ''}"
                yield move_row(operation, f"{SHORT[source]}→{SHORT[target]}", nbytes, measured)
            del xs, outs, copy


def in_place_rows(E: int, timer: Timer) -> Iterator[dict[str, Any]]:
    """Yield a row for the multiplication of a native tensor in place, contiguous and through a transposed view."""
    scale = torch.tensor([1.0009765625, 0.9990234375], device=timer.device).repeat(E // 2 + 1)[:E]
    for view in ("contiguous", "transposed view"):
        xs = [random((E, I, H), torch.bfloat16, timer.device) for _ in range(2)]
        native = xs if view == "contiguous" else [x.transpose(1, 2) for x in xs]
        measured = timer(
            copying(2 * xs[0].nbytes, timer.device),
            lambda n, native=native: kernels.scale_in_place(native[n % 2], scale),
            torch=lambda n, native=native: native[n % 2].mul_(scale[:, None, None]),
        )
        yield move_row(f"scale_in_place, {view}", "bf16", 2 * xs[0].nbytes, measured)


def move_row(operation: str, dtypes: str, nbytes: int, measured: Measured) -> dict[str, Any]:
    """Return one line of the table: GB/s of each contender, and how many times torch we are."""
    return {
        "operation": operation,
        "dtypes": dtypes,
        "bytes": nbytes,
        "GB/s": {name: nbytes / measured.median(name) / 1e9 for name in measured.seconds},
        "times torch": measured.median("torch") / measured.median("ours"),
        **measured.summary(),
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
        ours = Gemma4MoEStateDictAdapter(config, moe_config, None, dtype=target)
        others = {} if peer_class is None else {"peer": peer_class(config, moe_config, None, dtype=target)}
        native = ours.from_hf(hf)
        gate_up, down = sorted(native, key=lambda name: "down" in name)
        calls: dict[str, tuple[int, Callable[[Any], Any]]] = {
            "from_hf": (_nbytes(hf) + _nbytes(native), lambda adapter, hf=hf: _contiguous(adapter.from_hf(dict(hf)))),
            "to_hf": (2 * _nbytes(native), lambda adapter, native=native: _contiguous(adapter.to_hf(dict(native)))),
        }
        for part in (gate_up, down):
            calls[f"convert_single {part.rsplit('.', 1)[1]}"] = (
                2 * native[part].nbytes,
                lambda adapter, part=part, native=native: _contiguous(
                    dict(adapter.convert_single_tensor_to_hf(part, native[part]))
                ),
            )
        for call, (nbytes, function) in calls.items():
            measured = timer(
                copying(nbytes, device),
                lambda _, function=function, ours=ours: function(ours),
                **{name: lambda _, function=function, other=other: function(other) for name, other in others.items()},
            )
            dtypes = f"bf16→{SHORT[target]}" if call == "from_hf" else SHORT[target]
            yield call_row(call, dtypes, nbytes, measured)


def whole_model_rows(E: int, timer: Timer, layers: int = 30) -> Iterator[dict[str, Any]]:
    """Yield the row for `to_hf` of all layers' experts: ours against a copy of the same tensors."""
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    adapter = Gemma4MoEStateDictAdapter(config, SimpleNamespace(n_routed_experts=E), None, dtype=torch.bfloat16)
    # One storage for all layers: what is measured is the reading, and a card holds one model, not two.
    one = {
        "gate_and_up_projs": random((E, H, 2 * I), torch.bfloat16, timer.device),
        "down_projs": random((E, I, H), torch.bfloat16, timer.device),
    }
    prefixes = [f"model.language_model.layers.{layer}.moe.experts." for layer in range(layers)]
    native = {prefix + part: tensor for prefix in prefixes for part, tensor in one.items()}
    turns = count()

    def convert(_: int) -> None:
        for name, tensor in native.items():
            adapter.convert_single_tensor_to_hf(name, tensor)

    outs = [[torch.empty_like(tensor) for tensor in one.values()] for _ in range(2)]

    def copy(_: int) -> None:
        for _ in range(layers):
            for out, tensor in zip(outs[next(turns) % 2], one.values(), strict=True):
                out.copy_(tensor)

    measured = Timer(timer.device, max(3, timer.rounds // 2))(copy, convert)
    yield call_row(f"to_hf, {layers} layers", "bf16", 2 * layers * _nbytes(one), measured)


def call_row(call: str, dtypes: str, nbytes: int, measured: Measured) -> dict[str, Any]:
    """Return one line of the adapter's table, with how many times the peer we are."""
    times_peer = measured.median("peer") / measured.median("ours") if "peer" in measured.seconds else None
    return {"operation": call, "dtypes": dtypes, "bytes": nbytes, "times peer": times_peer, **measured.summary()}


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


def shown_moves(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table of bandwidths, each row as it is measured, and return the rows."""
    shown = []
    columns = f"{'copy':>7} {'ours':>7} {'torch':>7} {'compile':>8}  {'share of copy':18} {'×torch':>7}"
    print(f"\n{'GB/s':31} {'':10} {columns}")
    for r in rows:
        speed = {name: f"{value:.1f}" for name, value in r["GB/s"].items()}
        print(
            f"{r['operation']:31} {r['dtypes']:10} {speed['copy']:>7} {speed['ours']:>7} {speed['torch']:>7} "
            f"{speed.get('compile', ''):>8}  {share(r):18} {r['times torch']:7.1f}",
            flush=True,
        )
        shown.append(r)
        give_back_memory()
    return shown


def shown_calls(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table of the adapter's calls, each row as it is measured, and return the rows."""
    shown = []
    columns = f"{'copy ms':>8} {'ours ms':>8} {'peer ms':>8}  {'share of copy':18} {'×peer':>6}"
    print(f"\n{'':32} {'':10} {columns}")
    for r in rows:
        ms = {name: f"{seconds * 1e3:.2f}" for name, seconds in r["seconds"].items()}
        times_peer = "" if r["times peer"] is None else f"{r['times peer']:.1f}"
        print(
            f"{r['operation']:32} {r['dtypes']:10} {ms['copy']:>8} {ms['ours']:>8} {ms.get('peer', ''):>8}  "
            f"{share(r):18} {times_peer:>6}",
            flush=True,
        )
        shown.append(r)
        give_back_memory()
    return shown


def share(row: dict[str, Any]) -> str:
    """Return the share of the copy's bandwidth with its quartiles."""
    low, high = row["share quartiles"]
    return f"{row['share']:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """Measure, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=["move", "in-place", "adapter"])
    parser.add_argument("--dtypes", type=pairs_named, default=PAIRS)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fresh-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    timer = Timer(device, options.rounds)
    if device.type == "cpu":
        if not options.fresh_memory:
            keep_memory()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    about = machine(device) | {"fresh memory": options.fresh_memory}
    print(json.dumps(about, indent=1, ensure_ascii=False))
    moves, calls = [], []
    if "move" in options.rows:
        moves.append(move_rows(options.experts, timer, options.dtypes))
    if "in-place" in options.rows:
        moves.append(in_place_rows(options.experts, timer))
    if "adapter" in options.rows:
        calls.append(adapter_rows(options.experts, timer))
        if device.type == "cuda":
            calls.append(whole_model_rows(options.experts, timer))
    results = {
        "machine": about,
        "moves": shown_moves(chain(*moves)) if moves else [],
        "adapter": shown_calls(chain(*calls)) if calls else [],
    }
    if options.json:
        options.json.write_text(json.dumps(results, ensure_ascii=False))


def pairs_named(text: str) -> list[Pair]:
    """Return the pairs of dtypes that e.g. "bf16:bf16,bf16:fp32" names."""
    pairs = (pair.split(":") for pair in text.split(","))
    return [(DTYPES[source], DTYPES[target]) for source, target in pairs]


if __name__ == "__main__":
    main()
