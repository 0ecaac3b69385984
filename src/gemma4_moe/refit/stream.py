"""The weight stream: training weights converted for an inference engine, singly or in buckets."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe.adapter.configs import axis_sizes, conversion_of
from gemma4_moe.adapter.to_hf import excluding
from gemma4_moe.distributed.collectives import agree
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.distributed.ranks import current
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.dtypes import target_dtype
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.table import Layout
from gemma4_moe.refit.buckets import Buffers, aligned, plan_buckets
from gemma4_moe.refit.filling import Filler, holds_all
from gemma4_moe.refit.items import Planned, form_of, items_of, only_layers
from gemma4_moe.refit.preflight import check_against
from gemma4_moe.refit.state import StatePass, mappings_of, natives_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from gemma4_moe.refit.buckets import Bucket, Oversize, PlannedBucket
    from gemma4_moe.refit.items import Experts, Item, TensorFacts
    from gemma4_moe.refit.state import State


class WeightStream:
    """Native training weights in hf names and layout, contiguous, with `per_expert_scale` 1.

    Names, shapes and dtypes are read once, when the stream is made; values are read again on every pass. A pass goes in
    the order of `convert --to hf`, layer after layer; with "per-expert", a layer's `down_proj` of all experts come
    first, then `gate_proj` and `up_proj` of each. Before its first tensor, the ranks of every mesh agree on the pass,
    within a time limit.

    Args:
        adapter: The adapter: its configs give the sizes, its backend the kernel.
        state: A module (its `state_dict()`: buffers too, a tied tensor under its first name), a mapping with nemo
            names, or an iterable of mappings that can be read again, such as one per layer. DTensors may have any
            placement; plain tensors are whole.
        dtype: The dtype of every floating-point tensor, or torch's name of it; each one's own by default.
        experts: "fused" sends [E, ...] tensors, "per-expert" two-dimensional ones for each expert.
        bucket_bytes: The most bytes of tensors in a bucket.
        oversize: A tensor larger than that is an "error", or gets a bucket of its "own".
        exclude_key_regex: Leave out each tensor whose hf or nemo name this matches (`re.match`).
        layers: Send only these decoder layers.
        dst: The only rank that gets tensors; the others only take part in gathers. Every rank by default.

    Attributes:
        keeps: Whether this rank gets tensors.

    Raises:
        InputError: The state is not that of a Gemma 4 MoE model in the nemo layout, or lacks part of a layer.
        UsageError: An argument has an invalid value, or the state can be read only once.
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
        if oversize not in ("error", "own"):
            raise UsageError("no such value of oversize", expected="error or own", found=repr(oversize))
        if bucket_bytes < 1:
            raise UsageError("a bucket without room", expected="bucket_bytes of 1 or more", found=bucket_bytes)
        ranks = current()
        if dst is not None and not 0 <= dst < ranks.world:
            raise UsageError("no such rank", expected=f"dst from 0 to {ranks.world - 1}", found=dst)
        self._bucket_bytes = bucket_bytes
        self._oversize = oversize
        self.dst = dst
        self.keeps = dst is None or dst == ranks.rank
        self._kernel = conversion_of(adapter.backend)
        self._state = state
        self._natives: list[TensorFacts] = []
        self._mappings = 0
        self._aliases: dict[str, str] = {}
        self._buckets: list[PlannedBucket] | None = None
        inventory = Inventory(Layout.NEMO, axis_sizes(adapter.config, adapter.moe_config))
        into = None if dtype is None else target_dtype(str(dtype).removeprefix("torch."))
        excluded = excluding(exclude_key_regex)
        for tensors in mappings_of(state):
            natives, aliases = natives_of(tensors, self._mappings)
            self._natives += natives
            self._aliases |= aliases
            self._mappings += 1
        self._items = items_of(self._natives, inventory, into, form, excluded)
        if layers is not None:
            self._items = only_layers(self._items, layers, inventory)
        digest = hashlib.sha256(json.dumps(self.plan()).encode()).hexdigest()
        self._call = [digest, str(into), experts, bucket_bytes, oversize, exclude_key_regex, sorted(layers or ())]

    def plan(self) -> list[Planned]:
        """Return name, shape, dtype and size of each tensor in order; nothing communicates."""
        return [Planned(item.name, item.shape, item.dtype.name, item.nbytes) for item in self._items]

    def preflight(self, reference: str | Path | Iterable[Any]) -> None:
        """Compare the plan with the engine's tensors, which most engines don't.

        Args:
            reference: An hf directory, of which only headers are read; or hf names, or (name, shape) pairs. Experts may
                be fused or not.

        Raises:
            DifferenceError: The stream lacks a tensor, has one too many, or one of another shape; all are named.
        """
        check_against(self.plan(), self._aliases, reference)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Start a pass over (hf name, tensor) pairs, each tensor in new memory.

        Raises:
            InputError: The state has changed since the stream was made.
            ParallelError: Ranks disagree, or a collective failed.
        """
        filler, state = self._begin()
        for item in self._items:
            if self.keeps:
                yield item.name, _fresh(item, state, filler)
            elif not holds_all(state.tensor(item.origin), item.origin.name):
                _fresh(item, state, filler)
        state.finish()

    def buckets(self) -> Iterator[Bucket]:
        """Start a pass over the same tensors in buckets.

        A bucket is good until the one after the next is asked for; see `Bucket`. Buffers are on the tensors' device.

        Raises:
            UsageError: A tensor is larger than a bucket; or tensors are on several devices; or, in debug mode, the
                consumer keeps a bucket too long.
            InputError, ParallelError: As in an iteration.
        """
        if self._buckets is None:
            self._buckets = plan_buckets(self._items, self._bucket_bytes, self._oversize)
        filler, state = self._begin()
        device = next((state.tensor(item.origin).device for item in self._items), torch.device("cpu"))
        sizes = (planned.size for planned in self._buckets)
        buffers = Buffers(device, max((size for size in sizes if size <= aligned(self._bucket_bytes)), default=0))
        for planned in self._buckets:
            bucket = buffers.take(planned)
            for batch in planned.batches:
                item = batch.items[0]
                value = state.tensor(item.origin)
                if value.device != device:
                    raise UsageError(
                        "tensors on several devices in one stream of buckets",
                        tensor=item.origin.name,
                        expected=str(device),
                        found=str(value.device),
                        hint="iterate over the stream itself, or move the model to one device",
                    )
                filler.fill_batch(batch, value, bucket)
                del value
            filler.flush()
            if self.keeps:
                yield bucket
            buffers.asked_for_next(bucket)
            del bucket
        state.finish()

    def _begin(self) -> tuple[Filler, StatePass]:
        """Start a pass once all ranks agree on the call, the plan and placements."""
        placements = [(found.mesh, [found.name, found.placements]) for found in self._natives if found.mesh is not None]
        agree("stream", self._call, placements)
        return Filler(self._kernel, keeps=self.keeps), StatePass(self._state, self._mappings)


def _fresh(item: Item, state: StatePass, filler: Filler) -> torch.Tensor:
    value = state.tensor(item.origin)
    out = torch.empty(item.shape, dtype=getattr(torch, item.dtype.name), device=local_of(value).device)
    filler.fill(item, value, out)
    filler.flush()
    return out
