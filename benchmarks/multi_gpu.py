"""Layers of the real model on several GPUs: loaded, gathered, streamed and saved, beside the peer and the wire's limit.

    torchrun --nproc-per-node 8 benchmarks/multi_gpu.py [--layers 2] [--repeats 5] [--directory DIR] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --device cpu --experts 8 --hidden 96 --intermediate 40

NCCL on GPUs; gloo on a CPU, to try the program with small sizes. Experts are sharded at ep = all ranks, and at
ep_shard 2 × ep half of them; everything else by FSDP over all ranks. A checkpoint of random bf16 layers, 1.65 GB each,
is written into a new directory in DIR and removed. All results of ours are compared, bit by bit and on every rank, with
what one process makes of the whole tensors; a difference ends the program. Contenders alternate, after a round to warm
up. The peer runs once after that, or, where that took over five seconds, not again: at full size its gathers take
minutes, and its memory grows with them. A time is that of the slowest rank, in seconds, the median; `extra` is the most
that a rank holds beyond what it held before, on a GPU its own memory. Before every load the checkpoint is dropped from
the page cache. The limit is an all-gather of all that is loaded, gathered, streamed or saved.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multi_gpu_nemo
import torch
import torch.distributed as dist
from across_ranks import (
    LIMIT,
    PEER,
    Collectives,
    Report,
    all_gather,
    largest,
    measure,
    require_none,
    require_same_bits,
    shared_directory,
    start,
)
from layers_on_ranks import CountedSlices, Sizes, WholeWhenAsked, cases, unfilled, whole_of, write_source
from loading import forget

from gemma4_moe import Gemma4MoEStateDictAdapter, load_hf
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import Layout
from gemma4_moe.refit import WeightStream
from refit import BUCKET_BYTES, compared, consume, peers_adapter, todays_way

if TYPE_CHECKING:
    from collections.abc import Callable

    from layers_on_ranks import Case

State = dict[str, torch.Tensor]
Contenders = dict[str, "Callable[[], Any]"]

#: How many decoder layers the real model has.
MODEL_LAYERS = 30

#: More staging than a gather takes by default.
WIDE_STAGING_BYTES = 256 * 2**20


class Setting:
    """What the sections share: the checkpoint, what one process loads from it, and the two adapters."""

    def __init__(self, sizes: Sizes, source: Path, device: torch.device, repeats: int, *, peer: bool) -> None:
        self.sizes, self.source, self.device, self.repeats = sizes, source, device, repeats
        shapes = sizes.shapes(Layout.NEMO)
        self.whole = {name: torch.empty(s, dtype=torch.bfloat16, device=device) for name, s in shapes.items()}
        load_hf(self.whole, source)  # plain tensors: this process alone
        config = MoEConfig(sizes.E, sizes.H, sizes.I)
        moe = (shape for name, shape in sizes.shapes(Layout.HF).items() if lookup(name, Layout.HF) is not None)
        self.moe_bytes = sum(2 * prod(shape) for shape in moe)
        self.ours = Gemma4MoEStateDictAdapter(None, config, None, dtype=torch.bfloat16)
        self.peer = peers_adapter(sizes.E, torch.bfloat16) if peer else None

    def forget(self) -> None:
        """Drop the checkpoint from the page cache."""
        if dist.get_rank() == 0:
            forget(self.source)

    def require_hf(self, result: State) -> int:
        """Compare whole hf tensors with torch's transposes of the whole native ones; return how many there are."""
        require_none([name for name, tensor in result.items() if not bool(compared(self.whole, name, tensor)[0])])
        return len(result)


def loading(report: Report, case: Case, setting: Setting) -> State:
    """Load experts and routers by `load_hf` and by `from_hf`; return the whole state, filled."""
    state = unfilled(case, setting.sizes.shapes(Layout.NEMO))
    expected = case.parts(setting.whole)
    moe = [name for name in state if ".moe." in name]
    into = {name: state[name] for name in moe}
    lazily_into = unfilled(case, {name: setting.whole[name].shape for name in moe})
    read: dict[str, int] = {}

    def by_load_hf() -> None:
        read["ours, load_hf"] = load_hf(into, setting.source).read_bytes

    def by_from_hf() -> None:
        slices = CountedSlices(setting.source)
        setting.ours.from_hf(slices.items(), out=lazily_into)
        read["ours, from_hf of lazy slices"] = slices.read_bytes

    def by_peer() -> Any:
        slices = CountedSlices(setting.source)
        whole = {name: lazy[...].to(setting.device) for name, lazy in slices.items()}
        read[PEER] = slices.read_bytes
        return setting.peer.from_hf(whole, device_mesh=case.peers_mesh)

    contenders: Contenders = {
        LIMIT: all_gather([setting.whole[name] for name in moe], setting.device),
        "ours, load_hf": by_load_hf,
    }
    if find_spec("safetensors"):
        contenders["ours, from_hf of lazy slices"] = by_from_hf
    if find_spec("safetensors") and setting.peer is not None and case.known_to_peer:
        contenders[PEER] = by_peer
    found = measure(contenders, setting.repeats, setting.device, setting.forget)
    filled = {"ours, load_hf": into, "ours, from_hf of lazy slices": lazily_into}
    for name, row in found.items():
        most = largest(read.get(name, 0), setting.device)
        parts = {key: local_of(tensor) for key, tensor in filled.get(name, {}).items()}
        more = {
            "MB read by a rank": f"{most / 1e6:.2f}" if most else "–",
            "share of MoE bytes": f"{most / setting.moe_bytes:.3f}" if most else "–",
            "tensors equal": require_same_bits(parts, {key: expected[key] for key in parts}) or "–",
        }
        report.row("Loading", case.name, name, row, found[LIMIT], more)
    load_hf(state, setting.source)
    require_same_bits({name: local_of(tensor) for name, tensor in state.items()}, expected)
    return state


def gathering(report: Report, case: Case, setting: Setting, state: State) -> None:
    """Put the experts into the hf layout, gathered and sharded."""
    experts = {name: tensor for name, tensor in state.items() if ".moe.experts." in name}
    ours: dict[str, Callable[[], State]] = {
        "ours, gather=True": lambda: setting.ours.to_hf(experts, gather=True),
        "ours, gather=True, staging of 256 MiB": lambda: setting.ours.to_hf(
            experts, gather=True, staging_bytes=WIDE_STAGING_BYTES
        ),
        "ours, gather=False": lambda: setting.ours.to_hf(experts),
    }
    contenders: Contenders = {
        LIMIT: all_gather([setting.whole[name] for name in experts], setting.device),
        **ours,
    }
    if setting.peer is not None and case.known_to_peer:
        given = experts if case.peers_mesh is not None else {name: local_of(t) for name, t in experts.items()}
        contenders[PEER] = lambda: setting.peer.to_hf(given, device_mesh=case.peers_mesh)
    found = measure(contenders, setting.repeats, setting.device)
    for name in contenders:
        more: dict[str, Any] = {"collectives": "–", "extra GiB": f"{found[name].extra_bytes / 2**30:.2f}"}
        more["tensors equal"] = "–"
        if name in ours:
            with Collectives() as seen:
                result = ours[name]()
            more["collectives"] = seen.calls.total()
            assert (more["collectives"] > 0) == (name != "ours, gather=False"), seen.calls
            more["tensors equal"] = setting.require_hf({hf: whole_of(tensor) for hf, tensor in result.items()})
        report.row("Gathering", case.name, name, found[name], found[LIMIT], more)


def streaming(report: Report, case: Case, setting: Setting, state: State) -> None:
    """Fill a refit's buckets with all tensors of the layers, on every rank."""
    stream = WeightStream(state, setting.ours, dtype="bfloat16", bucket_bytes=BUCKET_BYTES)
    streamed = sum(planned.nbytes for planned in stream.plan())
    contenders: Contenders = {
        LIMIT: all_gather(setting.whole.values(), setting.device),
        "ours, buckets": lambda: consume(stream),
    }
    if setting.peer is not None:
        contenders[PEER + ", today's way"] = lambda: todays_way(setting.peer, WholeWhenAsked(state), torch.bfloat16)
    found = measure(contenders, setting.repeats, setting.device)
    different, equal = [], 0
    for bucket in stream.buckets():
        for name, tensor in bucket.tensors():
            equal += 1
            different += [] if bool(compared(setting.whole, name, tensor)[0]) else [name]
    require_none(different)
    for name, row in found.items():
        more = {
            "GB/s": f"{streamed / row.median / 1e9:.1f}",
            "extra GiB": f"{row.extra_bytes / 2**30:.2f}",
            f"s for {MODEL_LAYERS} layers": f"{row.median * MODEL_LAYERS / setting.sizes.layers:.3f}",
            "tensors equal": equal if name == "ours, buckets" else "–",
        }
        report.row("Streaming", case.name, name, row, found[LIMIT], more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--experts", type=int, default=128, help="a multiple of the number of ranks")
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=2, help="at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help=f"leave the adapter of {PEER} out")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the checkpoint is written for a while")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    sizes = Sizes(options.experts, options.hidden, options.intermediate, options.layers)
    device = start(options.device)
    report = Report(device, f"{sizes.layers} layers of E={sizes.E}, H={sizes.H}, I={sizes.I} in bf16")
    directory = shared_directory(options.directory)
    try:
        if dist.get_rank() == 0:
            write_source(directory / "hf", sizes, device)
        dist.barrier()
        run(report, Setting(sizes, directory / "hf", device, options.repeats, peer=not options.no_peer))
        for case in cases(device):
            multi_gpu_nemo.saving(report, case, sizes, device, directory, options)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
            if options.json:
                options.json.write_text(json.dumps(report.record, indent=1))
    dist.destroy_process_group()


def run(report: Report, setting: Setting) -> None:
    """Run the sections that need no NeMo but as a contender; what they hold in memory ends with them."""
    for part, package in (("lazy slices", "safetensors"), (PEER, "nemo_automodel")):
        if not find_spec(package):
            report.say(f"left out: {part}: {package} is not installed")
    states = [(case, loading(report, case, setting)) for case in cases(setting.device)]
    for section in (gathering, streaming):
        for case, state in states:
            section(report, case, setting, state)


if __name__ == "__main__":
    main()
