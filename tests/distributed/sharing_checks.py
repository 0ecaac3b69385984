"""`load_hf(share_reads=)` on each rank: the bits of one process, each byte read once, and no rank left waiting."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from distributed.io_checks import native, shard_all
from distributed.placement_checks import CASES, is_expert, same, shard
from gemma4_moe import load_hf, plan
from gemma4_moe.checkpoint.directory import StoredTensor
from gemma4_moe.converter import blocks
from gemma4_moe.distributed.ranks import current
from gemma4_moe.errors import CheckpointFormatError, Gemma4MoEError, ParallelError, SourceChangedError, UsageError
from gemma4_moe.model_io import pipeline, sharing

#: Placements that NeMo does not have: the last axis, or both inner ones.
MORE = {2: [((2,), (Shard(2),), None)], 4: [((2, 2), (Shard(2), Shard(1)), None)]}


def everyones(value):
    return current().everyones(value)


class Reads:
    """Records the ranges that are read of the weights, for the time of a `with` block."""

    def __enter__(self):
        self.ranges, self.original = [], StoredTensor.read_into

        def read_into(stored, destination, offset=0):
            self.ranges.append((stored.name, offset, offset + destination.nbytes))
            return self.original(stored, destination, offset)

        StoredTensor.read_into = read_into
        return self

    def __exit__(self, *_):
        StoredTensor.read_into = self.original


def once(ranges, sizes):
    """Check that ranges (name, start, end) cover each tensor of these sizes once."""
    ends = dict.fromkeys(sizes, 0)
    for name, start, end in sorted(ranges):
        assert start == ends[name], (name, start, ends[name])
        ends[name] = end
    assert ends == sizes


def cut_small():
    """Let a block hold two experts or so, a segment a few blocks."""
    blocks.BLOCK_BYTES, sharing.SEGMENT_BYTES = 900, 4000


def check_every_placement(world, source, sizes):
    cut_small()
    for shape, placements, _ in CASES[world] + MORE.get(world, []):
        mesh = init_device_mesh("cpu", shape)
        check_shared(shard_all(native(), mesh, placements), source, sizes, (shape, placements))
        hybrid = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
        state = {name: distribute_tensor(t, mesh, hybrid, src_data_rank=None) for name, t in native().items()}
        check_shared(state, source, sizes, (shape, "HSDP"))
    check_shared(native(), source, sizes, "replicas")


def check_shared(expected, source, sizes, case):
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    seen = []
    with Reads() as reads:
        found = load_hf(model, source, share_reads=True, progress=lambda *of: seen.append(of))
    same(model, expected)
    assert found.read_bytes == sum(end - start for _, start, end in reads.ranges), case
    assert seen[-1][0] == seen[-1][1], case
    assert seen == sorted(seen), case
    once([one for own in everyones(reads.ranges) for one in own], sizes)


def check_inner_shards_read_their_share(world, source):
    """Without sharing each rank reads all rows of every expert; with it 1.05 of its share at most."""
    mesh = init_device_mesh("cpu", (world,))
    blocks.BLOCK_BYTES = 900
    state = shard(native_of(source), mesh, (Shard(1),))
    model = {name: tensor for name, tensor in state.items() if is_expert(name)}
    alone, shared = (load_hf(model, source, share_reads=share).read_bytes for share in (False, True))
    assert shared <= 1.05 * alone / world, (shared, alone / world)


def native_of(source):
    """Return the native model of a directory, as one process loads it."""
    shapes = {name: target.shape for name, target in plan(source).plan.tensors.items()}
    model = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    load_hf(model, source)
    return model


def check_groups(source, sizes):
    """Two nodes of two ranks: each reads all bytes once. A rank that is in no group is refused."""
    cut_small()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    expected = shard_all(native(), mesh["rank"], (Shard(0),))
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    with Reads() as reads:
        load_hf(model, source, share_reads=mesh.get_group("rank"))
    same(model, expected)
    node = dist.get_rank() // 2
    once([one for own in everyones(reads.ranges)[2 * node : 2 * node + 2] for one in own], sizes)
    group = dist.new_group([0, 1])
    if node == 1:
        with pytest.raises(UsageError, match="not in the process group"):
            load_hf(model, source, share_reads=group)


def check_stages(source):
    """Each rank has one layer, and both the embedding: what one rank alone needs does not travel."""
    rank = dist.get_rank()
    cut_small()
    expected = {name: t for name, t in native().items() if f"layers.{rank}." in name or "embed" in name}
    model = {name: torch.full_like(tensor, 3.0) for name, tensor in expected.items()}
    found = load_hf(model, source, share_reads=True)
    same(model, expected)
    assert set(found.unexpected_keys) == native().keys() - expected.keys()


def check_memory(source, most):
    """Replicas: half of all blocks are received. No more than the slots, the scales and little else is held."""
    model = {name: torch.zeros_like(tensor) for name, tensor in native().items()}
    blocks.BLOCK_BYTES = 10**6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        load_hf(model, source, share_reads=True)
    held, peak = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    slots = (blocks.LOAD_BLOCKS + blocks.RECEIVED_BLOCKS) * blocks.BLOCK_BYTES
    assert slots <= peak <= slots + most, (peak, slots)


def end_together(source, fail, error, words, seconds=40, others=ParallelError):
    """Call `fail` in the last rank at its third read: it raises its own error, the others one that names the rank."""
    cut_small()
    model = {name: torch.zeros_like(tensor) for name, tensor in native().items()}
    last = dist.get_rank() == dist.get_world_size() - 1
    original, reads = StoredTensor.read_into, []

    def read_into(stored, destination, offset=0):
        reads.append(offset)
        if last and len(reads) == 3:
            fail(stored.file)
        return original(stored, destination, offset)

    StoredTensor.read_into = read_into
    start = time.monotonic()
    with pytest.raises(error if last else others) as caught:
        load_hf(model, source, share_reads=True)
    assert time.monotonic() - start < seconds
    if not last or error is not ParallelError:
        assert words in str(caught.value), str(caught.value)
    return caught.value


def refuse(file):
    raise OSError(5, "Input/output error")


def truncate(file):
    with file.path.open("r+b") as opened:
        opened.truncate(3000)


def touch(file):
    os.utime(file.path, ns=(1, 1))


def check_a_rank_whose_disk_fails(source, world):
    error = end_together(source, refuse, OSError, "Input/output error")
    if dist.get_rank() != world - 1:
        assert f"rank {world - 1} could not read its share" in str(error)


def check_a_truncated_file(source):
    end_together(source, truncate, CheckpointFormatError, "truncated", others=Gemma4MoEError)


def check_a_changing_file(source):
    end_together(source, touch, SourceChangedError, "changed while it was read", others=Gemma4MoEError)


def check_a_killed_rank(source):
    end_together(source, lambda _: os._exit(0), SystemExit, "was killed")


def check_disagreements(source, other):
    """Another directory, one that is not there, or a tensor of another shape on one rank: all raise."""
    second = dist.get_rank() == 1
    model = native()
    with pytest.raises(ParallelError, match="different checkpoints"):
        load_hf(model, other if second else source, share_reads=True)
    with pytest.raises(CheckpointFormatError if second else ParallelError, match="no such directory"):
        load_hf(model, source / "none" if second else source, share_reads=True)
    name = next(iter(model))
    with pytest.raises(Gemma4MoEError, match="another shape"):
        load_hf(model | ({name: model[name][:2]} if second else {}), source, share_reads=True)
    with pytest.raises(UsageError, match="no backend"):
        sharing.require_backend(current(), [torch.device("mps")])
    load_hf(model, source, share_reads=True)
    same(model, native())


def check_interrupt(source):
    """Ctrl-C on one rank: it ends at once; the other one is told once the first is gone."""
    model = {name: torch.zeros_like(tensor) for name, tensor in native().items()}
    cut_small()
    if dist.get_rank() == 1:
        pipeline.Pipeline._read = _interrupted
        with pytest.raises(KeyboardInterrupt):
            load_hf(model, source, share_reads=True)
        os._exit(0)
    with pytest.raises(ParallelError, match="logs of the other ranks"):
        load_hf(model, source, share_reads=True)


def _interrupted(*_):
    raise KeyboardInterrupt
