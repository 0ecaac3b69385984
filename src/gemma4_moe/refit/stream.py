"""The weight stream: what an inference engine is to load, straight from the training weights, in one pass."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gemma4_moe.adapter.configs import axis_sizes, conversion_of
from gemma4_moe.adapter.to_hf import excluding
from gemma4_moe.distributed.collectives import agree
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.dtypes import target_dtype
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.table import Layout
from gemma4_moe.refit.buckets import Buffers, plan_buckets
from gemma4_moe.refit.filling import Filler, alone
from gemma4_moe.refit.items import form_of, items_of, only_layers
from gemma4_moe.refit.preflight import check_against
from gemma4_moe.refit.state import Reader, check_readable_again, describe, mappings_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.refit.buckets import Bucket, Oversize, PlannedBucket
    from gemma4_moe.refit.items import Experts, Item, Planned, Source
    from gemma4_moe.refit.state import State


class WeightStream:
    """Native training weights as an inference engine takes them: hf names and layout, contiguous, `per_expert_scale` 1.

    Names, shapes and dtypes are read once, when the stream is made; the values anew on every pass. A pass goes in the
    order of `convert --to hf`, layer after layer; with "per-expert", a layer's `down_proj` of all experts come first,
    then `gate_proj` and `up_proj` of each. Before its first tensor, the ranks of every mesh agree on what they are
    about to do, within a time limit.

    Args:
        adapter: The adapter: its configs give the sizes, its backend the kernel.
        state: A module (its `state_dict()`: buffers too, a tied tensor under its first name), a mapping with nemo
            names, or an iterable of mappings that can be read again, such as one a layer. DTensors of any placement;
            plain tensors are whole.
        dtype: The dtype of every floating-point tensor, or torch's name of it; each one's own by default.
        experts: "fused" sends [E, ...] tensors, "per-expert" two-dimensional ones for each expert.
        bucket_bytes: The most bytes of tensors in a bucket.
        oversize: What happens to a tensor larger than that: "error", or a bucket of its "own".
        exclude_key_regex: Leave out what this matches (`re.match`) by its hf name or by its nemo name.
        layers: Send only these decoder layers.
        dst: The only rank that gets tensors; the others take part and get none. Every rank by default.

    Attributes:
        keeps: Whether this rank gets tensors.

    Raises:
        InputError: The state is not that of a Gemma 4 MoE model in the nemo layout, or lacks part of a layer.
        UsageError: An argument has no meaning, or the state can be read only once.
    """

    def __init__(
        self,
        adapter: Any,
        state: State,
        *,
        dtype: torch.dtype | str | None = None,
        experts: Experts = "fused",
        bucket_bytes: int = 2**30,
        oversize: Oversize = "error",
        exclude_key_regex: str | None = None,
        layers: Collection[int] | None = None,
        dst: int | None = None,
    ) -> None:
        form = form_of(experts)
        _check_choice("oversize", oversize, ("error", "own"))
        if bucket_bytes < 1:
            raise UsageError("a bucket without room", expected="bucket_bytes of 1 or more", found=bucket_bytes)
        check_readable_again(state)
        self.experts = experts
        self.bucket_bytes = bucket_bytes
        self.oversize = oversize
        self.dst = dst
        self.keeps = _keeps(dst)
        self._kernel = conversion_of(adapter.backend)
        self._state = state
        self._sources: list[dict[str, Source]] = []
        self._aliases: dict[str, str] = {}
        self._buckets: list[PlannedBucket] | None = None
        inventory = Inventory(Layout.NEMO, axis_sizes(adapter.config, adapter.moe_config))
        into = None if dtype is None else target_dtype(str(dtype).removeprefix("torch."))
        excluded = excluding(exclude_key_regex)
        for tensors in mappings_of(state):
            sources, aliases = describe(tensors)
            self._aliases |= aliases
            self._sources.append(sources)
        self._items = items_of(self._sources, inventory, into, form, excluded)
        if layers is not None:
            self._items = only_layers(self._items, layers, inventory)
        options = [str(into), experts, bucket_bytes, oversize, exclude_key_regex, sorted(layers or ())]
        self._agreements = _agreements(self._sources, options, self._items)

    def plan(self) -> list[Planned]:
        """Return name, shape, dtype and size of everything that a pass gives, in order. No kernel, no collective."""
        return [item.planned for item in self._items]

    def preflight(self, reference: str | Path | Iterable[Any]) -> None:
        """Compare the plan with what the engine has, which most engines don't.

        Args:
            reference: An hf directory, of which only headers are read; or hf names, or (name, shape) pairs. Fused
                experts are compared with per-expert ones by the same table.

        Raises:
            DifferenceError: It names every tensor that the stream lacks, has too much, or has in another shape.
        """
        check_against(self.plan(), self._aliases, reference)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Start a pass: (hf name, tensor), each in memory of its own that the stream does not keep.

        Raises:
            InputError: The state is no longer what it was when the stream was made.
            ParallelError: Ranks disagree, or a collective failed.
        """
        filler, reader = self._begin()
        for item in self._items:
            if self.keeps:
                yield item.name, _fresh(item, reader, filler)
            elif not alone(reader.tensor(item.mapping, item.native), item.native):
                _fresh(item, reader, filler)
        reader.finish()

    def buckets(self) -> Iterator[Bucket]:
        """Start a pass: the same tensors in buckets, filled straight from the native ones.

        A bucket is good until the one after the next is asked for; see `Bucket`. Buffers are on the tensors' device.

        Raises:
            UsageError: A tensor is larger than a bucket, before the first byte moves; tensors on several devices; or,
                in debug mode, a consumer keeps a bucket too long.
            InputError, ParallelError: As in an iteration.
        """
        if self._buckets is None:
            self._buckets = plan_buckets(self._items, self.bucket_bytes, self.oversize)
        filler, reader = self._begin()
        buffers: Buffers | None = None
        for planned in self._buckets:
            if buffers is None:
                first = planned.runs[0].items[0]
                device = local_of(reader.tensor(first.mapping, first.native)).device
                buffers = Buffers(device, max((p.size for p in self._buckets if p.ordinary), default=0))
            bucket = buffers.take(planned)
            for run in planned.runs:
                item = run.items[0]
                value = reader.tensor(item.mapping, item.native)
                _check_device(value, item.native, device)
                filler.fill_run(run, value, bucket)
                del value
            filler.flush()
            if self.keeps:
                yield bucket
            buffers.asked_for_next(bucket)
            del bucket
        reader.finish()

    def _begin(self) -> tuple[Filler, Reader]:
        """Let the ranks of every mesh agree on the pass."""
        for mesh, what in self._agreements.items():
            agree(mesh, what)
        return Filler(self._kernel, keeps=self.keeps), Reader(self._state, self._sources)


def _fresh(item: Item, reader: Reader, filler: Filler) -> torch.Tensor:
    value = reader.tensor(item.mapping, item.native)
    out = torch.empty(item.shape, dtype=getattr(torch, item.dtype.name), device=local_of(value).device)
    filler.fill(item, value, out)
    filler.flush()
    return out


def _agreements(
    sources: Iterable[dict[str, Source]], options: list[Any], items: Iterable[Item]
) -> dict[DeviceMesh, list[Any]]:
    """Return what the ranks of each mesh have to agree on: the options, each DTensor's placements, and the plan."""
    digest = hashlib.sha256(json.dumps([item.planned for item in items]).encode()).hexdigest()
    found: dict[DeviceMesh, list[Any]] = {}
    for mapping in sources:
        for name, source in mapping.items():
            if source.mesh is not None:
                found.setdefault(source.mesh, ["stream", options, digest]).append([name, source.placements])
    return found


def _check_device(value: torch.Tensor, name: str, device: torch.device) -> None:
    found = value.device
    if found != device:
        raise UsageError(
            "tensors on several devices in one stream of buckets",
            tensor=name,
            expected=str(device),
            found=str(found),
            hint="iterate over the stream itself, or bring the model to one device",
        )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"no such value of {name}", expected=" or ".join(known), found=repr(value))


def _keeps(dst: int | None) -> bool:
    """Say whether this rank gets the tensors."""
    initialised = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if initialised else (1, 0)
    if dst is not None and not 0 <= dst < world:
        raise UsageError("no such rank", expected=f"dst from 0 to {world - 1}", found=dst)
    return dst is None or dst == rank
