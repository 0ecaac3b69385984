"""How fast a refit's buckets are filled on a GPU: ours beside a device copy, and beside the way it is done today.

    python benchmarks/refit.py [--layers 4] [--experts 128] [--repeats 7] [--device cuda] [--json FILE]

Bandwidth counts bytes read plus bytes written. `share` is bandwidth over that of a plain copy of as many bytes in the
same run. Today's way is that of NeMo-RL: the peer's `convert_single_tensor_to_hf`, cast, contiguous, copied
into a bucket, and all tensors converted once before to learn their shapes; without nemo-automodel 0.7.0
it is left out. Memory is what the peak of a pass is above the model. Contenders alternate; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe import Gemma4MoEStateDictAdapter
from gemma4_moe.adapter import MoEConfig
from gemma4_moe.refit import WeightStream

if TYPE_CHECKING:
    from collections.abc import Callable

H, I = 2816, 704  # noqa: E741  the real model's
BUCKET_BYTES = 2**30


def native_state(layers: int, experts: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Layers of the real model's sizes: experts, router, dense MLP, attention, norms and the scalar."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        path = f"model.language_model.layers.{layer}."
        shapes |= {
            path + "moe.experts.gate_and_up_projs": (experts, H, 2 * I),
            path + "moe.experts.down_projs": (experts, I, H),
            path + "moe.gate.proj.weight": (experts, H),
            path + "moe.gate.scale": (H,),
            path + "mlp.gate_proj.weight": (2112, H),
            path + "mlp.up_proj.weight": (2112, H),
            path + "mlp.down_proj.weight": (H, 2112),
            path + "self_attn.q_proj.weight": (4096, H),
            path + "self_attn.k_proj.weight": (2048, H),
            path + "self_attn.v_proj.weight": (2048, H),
            path + "self_attn.o_proj.weight": (H, 4096),
            path + "input_layernorm.weight": (H,),
            path + "layer_scalar": (1,),
        }
    return {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def consume(stream: WeightStream) -> None:
    for _ in stream.buckets():
        pass


def copies(state: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """A plain copy of the same bytes into the same two buffers: the limit of the device."""
    buffers = [torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=t.device) for t in list(state.values())[:2]]
    read = sum(tensor.nbytes for tensor in state.values())
    moved = read + sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=buffers[0].device)

    def run() -> None:
        for turn, first in enumerate(range(0, len(source), BUCKET_BYTES)):
            part = source[first : first + BUCKET_BYTES]
            buffers[turn % 2][: len(part)].copy_(part)

    return run


def todays_way(peer: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    shapes = {}
    for name, tensor in state.items():
        for hf, converted in peer.convert_single_tensor_to_hf(name, tensor, quantization=False):
            shapes[hf] = (converted.shape, converted.dtype)
    device = next(iter(state.values())).device
    buffers, used, turn = [torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device) for _ in range(2)], 0, 0
    for name, tensor in state.items():
        for _, converted in peer.convert_single_tensor_to_hf(name, tensor, quantization=False):
            raw = converted.to(device, dtype).contiguous().view(-1).view(torch.uint8)
            if used + len(raw) > BUCKET_BYTES:
                used, turn = 0, 1 - turn
            buffers[turn][used : used + len(raw)].copy_(raw)
            used += -(-len(raw) // 512) * 512


def peers_adapter(experts: int, dtype: torch.dtype) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nemo_automodel.components.models.gemma4_moe.state_dict_adapter import (
                Gemma4MoEStateDictAdapter as Peer,
            )
    except ImportError:
        return None
    config = SimpleNamespace(hidden_size=H, moe_intermediate_size=I, num_experts=experts)
    return Peer(config, SimpleNamespace(n_routed_experts=experts, moe_inter_dim=I, dim=H), None, dtype=dtype)


def measure(contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": 0} for name in contenders}
    for turn in range(-1, repeats):
        for name, contender in contenders.items():
            before = 0
            if device.type == "cuda":
                torch.cuda.empty_cache() if turn < 0 else None
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            wait()
            start = time.perf_counter()
            contender()
            wait()
            if turn >= 0:
                found[name]["seconds"].append(time.perf_counter() - start)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
                found[name]["peak_bytes"] = max(found[name]["peak_bytes"], peak)
    return found


def check_bits(state: dict[str, torch.Tensor], stream: WeightStream) -> None:
    """Read the buckets on a stream of our own, late, and compare them with torch's transposes."""
    late = torch.cuda.Stream() if next(iter(state.values())).is_cuda else None
    wrong = []
    for bucket in stream.buckets():
        if late is not None:
            late.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(late):
                torch.cuda._sleep(20_000_000)
                wrong += [(n, *compared(state, n, t)) for n, t in bucket.tensors()]
            bucket.done_on(late)
        else:
            wrong += [(n, *compared(state, n, t)) for n, t in bucket.tensors()]
    different = [name for name, equal in wrong if not bool(equal)]
    assert not different, different
    print(f"bits of {len(wrong)} tensors, read late on another stream: equal")


def compared(state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> tuple[torch.Tensor]:
    native = {
        "experts.gate_up_proj": "moe.experts.gate_and_up_projs",
        "experts.down_proj": "moe.experts.down_projs",
        "router.proj.weight": "moe.gate.proj.weight",
        "router.scale": "moe.gate.scale",
    }
    if name.endswith("per_expert_scale"):
        return ((tensor == 1).all(),)
    other = next((name.removesuffix(hf) + own for hf, own in native.items() if name.endswith(hf)), name)
    source = state[other].to(tensor.dtype)
    return ((source.transpose(1, 2) if source.ndim == 3 else source).eq(tensor).all(),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    adapter = Gemma4MoEStateDictAdapter(None, MoEConfig(options.experts, H, I), None)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {card}, torch {torch.__version__}, {options.layers} layers")
    print("| weights | contender | seconds | GB/s | share of a copy | × ours | peak extra GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    record: dict[str, Any] = {"card": card, "torch": torch.__version__, "layers": options.layers, "rows": []}
    for native in (torch.bfloat16, torch.float32):
        state = native_state(options.layers, options.experts, native, device)
        moved = sum(tensor.nbytes + 2 * tensor.numel() for tensor in state.values())
        arguments: dict[str, Any] = {"dtype": "bfloat16", "bucket_bytes": BUCKET_BYTES}
        fused = WeightStream(state, adapter, **arguments)
        single = WeightStream(state, adapter, experts="per-expert", **arguments)
        check_bits(state, fused)
        contenders: dict[str, Callable[[], None]] = {
            "device copy": copies(state, torch.bfloat16),
            "ours, fused": lambda fused=fused: consume(fused),
            "ours, per-expert": lambda single=single: consume(single),
        }
        peer = peers_adapter(options.experts, native)
        if peer is not None:
            contenders["today's way"] = lambda peer=peer, state=state: todays_way(peer, state, torch.bfloat16)
        found = measure(contenders, options.repeats, device)
        seconds = {name: statistics.median(row["seconds"]) for name, row in found.items()}
        for name, took in seconds.items():
            row = {
                "weights": f"{str(native).removeprefix('torch.')} → bfloat16",
                "contender": name,
                "seconds": took,
                "bandwidth": moved / took / 1e9,
                "share": seconds["device copy"] / took,
                "times_ours": took / seconds["ours, fused"],
                "peak_gib": found[name]["peak_bytes"] / 2**30,
            }
            record["rows"].append(row)
            print(
                f"| {row['weights']} | {name} | {took:.4f} | {row['bandwidth']:.0f} | {row['share']:.1%} "
                f"| {row['times_ours']:.1f} | {row['peak_gib']:.2f} |"
            )
        del state, fused, single, contenders
    if options.json:
        options.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
