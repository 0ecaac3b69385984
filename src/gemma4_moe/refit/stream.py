"""The weight stream: training weights converted for an inference engine, singly or in buckets."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe.adapter.configs import conversion_of
from gemma4_moe.adapter.to_hf import excluding, left_out
from gemma4_moe.distributed.collectives import agree, digests, ranks_where
from gemma4_moe.distributed.placements import local_of
from gemma4_moe.distributed.ranks import current
from gemma4_moe.errors import InputError, ParallelError, UsageError
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.refit.ahead import Ahead
from gemma4_moe.refit.arguments import adapter_of, check_sizes, sizes_of
from gemma4_moe.refit.buckets import aligned, buffers_for, plan_buckets
from gemma4_moe.refit.filling import Filler, holds_all
from gemma4_moe.refit.items import Planned, dtype_of, form_of, items_of, layout_of, only_layers
from gemma4_moe.refit.lending import Lender
from gemma4_moe.refit.lora import Merger, adapter_tensors, lora_apart
from gemma4_moe.refit.preflight import check_against
from gemma4_moe.refit.state import StatePass, contents_of, mappings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from gemma4_moe.refit.buckets import Bucket, Oversize, PlannedBucket
    from gemma4_moe.refit.items import Dtype, Experts, Item
    from gemma4_moe.refit.lora import Lora
    from gemma4_moe.refit.state import Contents, State


class WeightStream:
    """Training weights in hf names and layout, contiguous.

    Native weights are converted, with `per_expert_scale` 1. The weights of a transformers model, which are in the hf
    layout already, are sent as they are. Names, shapes and dtypes are read once, when the stream is made; values are
    read again on every pass. A pass goes in the order of `convert --to hf`, layer after layer; with "per-expert", a
    layer's `down_proj` of all experts come first, then `gate_proj` and `up_proj` of each. Before its first tensor, the
    ranks of every mesh agree on the pass, within a time limit.

    A consumer that stops early, by `break` or an exception, ends the pass on all ranks: its rank still takes part in
    the gathers that are left, and the others raise a ParallelError at the end. The next pass starts anew. A generator
    that is held by a name is closed by `contextlib.closing`.

    Args:
        state: A module (its `state_dict()`: buffers too, a tied tensor under its first name), a mapping, or an iterable
            of mappings that can be read again, such as one per layer; a pipeline stage has its own layers. DTensors
            may have any placement; plain tensors are whole. Names lose the components of torch's wrappers
            (`layout.wrappers`); an `_extra_state` is left out.
        adapter: The adapter: its configs give the sizes, its backend the kernel. By default they come from a module's
            own `config` and from the tensors.
        dtype: The dtype of every floating-point tensor, or torch's name of it, or a function that returns one of these
            for an hf name. None keeps each one's own.
        experts: "fused" sends [E, ...] tensors, "per-expert" two-dimensional ones for each expert.
        names: A function that returns the name under which a tensor is sent, for its hf name, or None to leave it out.
        bucket_bytes: The most bytes of tensors in a bucket.
        oversize: A tensor larger than that is an "error", or gets a bucket of its "own".
        buffers: The most buffers that `buckets` fills before the consumer has dropped an earlier one. By default as
            many as serve an engine that keeps a layer's tensors until it has all of them. A consumer that drops each
            bucket before the next takes two, whatever the limit.
        exclude_key_regex: Leave out each tensor whose hf or nemo name this matches (`re.match`).
        layers: Send only these decoder layers.
        dst: The only rank that gets tensors; the others only take part in gathers. Every rank by default.
        lora: For a native state with LoRA parameters: "merged" adds lora_alpha / r · B · A to each weight in fp32 and
            rounds once, "separate" sends the weights without it, and `lora_tensors` gives it. Refused by default.
        lora_alpha: The alpha of its scaling.

    Attributes:
        keeps: Whether this rank gets tensors.

    Raises:
        InputError: The state is not that of a Gemma 4 MoE model, lacks part of a layer, or has LoRA parameters.
        UsageError: An argument has an invalid value, or the state can be read only once.
    """

    def __init__(
        self,
        state: State,
        adapter: Any = None,
        *,
        dtype: Dtype | Callable[[str], Dtype] = None,
        experts: Experts = "fused",
        names: Callable[[str], str | None] | None = None,
        bucket_bytes: int = 2**30,
        oversize: Oversize = "error",
        buffers: int | None = None,
        exclude_key_regex: str | None = None,
        layers: Collection[int] | None = None,
        dst: int | None = None,
        lora: Lora | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        form, ranks = form_of(experts), current()
        check_sizes(bucket_bytes, oversize, buffers)
        if dst is not None and not 0 <= dst < ranks.world:
            raise UsageError("no such rank", expected=f"dst from 0 to {ranks.world - 1}", found=dst)
        self.dst = dst
        self.keeps = dst is None or dst == ranks.rank
        self._bucket_bytes, self._oversize, self._buffers = bucket_bytes, oversize, buffers
        adapter = adapter_of(state) if adapter is None else adapter
        self._kernel = conversion_of(getattr(adapter, "backend", None))
        self._state = state
        excluded = excluding(exclude_key_regex)
        self._left_out = lambda name: exclude_key_regex is not None and left_out(name, excluded)
        self._contents: list[Contents] = []
        for number, tensors in enumerate(mappings_of(state)):
            self._contents.append(contents_of(tensors, number, self._left_out))
        natives = [facts for contents in self._contents for facts in contents.natives]
        natives, self._pairs = lora_apart(natives, lora, lora_alpha)
        self._lora, self._alpha = lora, lora_alpha
        inventory = Inventory(layout_of(natives), sizes_of(state, adapter), leaves_out=self._left_out)
        for name in (each for contents in self._contents for each in contents.left_out):
            inventory.leave_out(name)
        self._items = items_of(natives, inventory, form, excluded, dtype_of(dtype), names or (lambda name: name))
        if layers is not None:
            self._items = only_layers(self._items, layers, inventory)
        sent, ties = names or str, [tie for contents in self._contents for tie in contents.aliases.items()]
        self._aliases = {sent(alias): sent(name) for alias, name in ties}
        self._meshes = {facts.mesh: None for facts in natives if facts.mesh is not None}
        sharded = [*natives, *(side for pair in self._pairs.values() for side in (pair.a, pair.b))]
        self._placements = digests((each.mesh, [each.name, each.placements]) for each in sharded)
        self._buckets: tuple[list[PlannedBucket], int] | None = None
        digest = hashlib.sha256(json.dumps(self.plan()).encode()).hexdigest()
        self._call = [digest, experts, bucket_bytes, oversize, exclude_key_regex, sorted(layers or ())]
        self._call += [lora, lora_alpha]

    def plan(self) -> list[Planned]:
        """Return name, shape, dtype and size of each tensor in order; nothing communicates."""
        return [Planned(item.name, item.shape, item.dtype.name, item.nbytes) for item in self._items]

    def buffers(self) -> tuple[int, int]:
        """Return the most buffers that a pass of buckets fills at a time, and the size in bytes of the largest."""
        planned, count = self._planned_buckets()
        return count, max((bucket.size for bucket in planned), default=0)

    def preflight(self, reference: str | Path | Iterable[Any], others: Iterable[Iterable[Planned]] = ()) -> None:
        """Compare the plan with the engine's tensors, which most engines don't.

        Args:
            reference: An hf directory, of which only headers are read; or hf names, or (name, shape) pairs. Experts may
                be fused or not.
            others: The plans of other pipeline stages, whose streams send the rest.

        Raises:
            DifferenceError: The stream lacks a tensor, has one too many, or one of another shape; all are named.
        """
        plans = [self.plan(), *others]
        check_against([planned for plan in plans for planned in plan], self._aliases, reference)

    @torch.no_grad()
    def lora_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return a separate adapter in vLLM's form, for an engine with the weights that this stream sends.

        Its config has the largest rank as r and the alpha of this stream; a smaller rank's ratio is in its B. The scale
        is folded into these weights, so B of `down` is as it is. Ranks of a mesh must call together. For an engine with
        the published weights use `convert_lora`.
        """
        return adapter_tensors(self._pairs, StatePass(self._state, self._contents, self._left_out).tensor)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Start a pass over (hf name, tensor) pairs, each tensor in new memory.

        Raises:
            InputError: The state has changed since the stream was made.
            ParallelError: Ranks disagree, a collective failed, or another rank stopped the pass.
        """
        filler, state = self._begin()
        stopped = False
        for item in self._items:
            if stopped and not self._meshes:
                return
            if self.keeps and not stopped:
                try:
                    yield item.name, _fresh(item, state, filler)
                except GeneratorExit:
                    stopped = True
            elif not holds_all(state.tensor(item.origin), item.origin.name):
                _fresh(item, state, filler)
        self._end(state, stopped=stopped)

    def buckets(self) -> Iterator[Bucket]:
        """Start a pass over the same tensors in buckets, in buffers on the tensors' device.

        A bucket's tensors are the consumer's until it has dropped them: its buffer is not filled again before.

        Raises:
            UsageError: A tensor is larger than a bucket; or tensors are on several devices; or the consumer still holds
                every buffer.
            InputError, ParallelError: As in an iteration.
        """
        planned, count = self._planned_buckets()
        filler, state = self._begin()
        device = next((state.tensor(item.origin).device for item in self._items), torch.device("cpu"))
        ordinary = max((each.size for each in planned if each.size <= aligned(self._bucket_bytes)), default=0)
        failure, stopped = None, False
        wired = device if self._meshes and device.type == "cuda" else None
        ahead = Ahead(Lender(device, count), ordinary, partial(self._fill, state, filler), wired)
        with closing(ahead):
            for each, following in zip_longest(planned, planned[1:]):
                if stopped and not self._meshes:
                    break
                try:
                    bucket = ahead.take(each, following)
                except UsageError as error:
                    failure, stopped = error, True
                    ahead.lender = Lender(device, 1)  # for the gathers that are left
                    bucket = ahead.take(each, None)
                if self.keeps and not stopped:
                    try:
                        yield bucket
                    except GeneratorExit:
                        stopped, ahead.lender = True, Lender(device, 1)
                del bucket  # or its buffer would stay lent
        self._end(state, stopped=stopped, failure=failure)

    def _planned_buckets(self) -> tuple[list[PlannedBucket], int]:
        """Return the buckets, and the most buffers that a pass fills at a time."""
        if self._buckets is None:
            planned = plan_buckets(self._items, self._bucket_bytes, self._oversize)
            self._buckets = planned, buffers_for(planned) if self._buffers is None else self._buffers
        return self._buckets

    @torch.no_grad()
    def _fill(self, state: StatePass, filler: Filler, planned: PlannedBucket, bucket: Bucket) -> None:
        """Write a bucket's tensors to their places."""
        device = bucket.buffer.device
        stream = torch.cuda.current_stream(device) if self._meshes and device.type == "cuda" else None
        for batch in planned.batches:
            origin = batch.items[0].origin
            value = state.tensor(origin)
            if value.device != device:
                raise UsageError(
                    "tensors on several devices in one stream of buckets",
                    tensor=origin.name,
                    expected=str(device),
                    found=str(value.device),
                    hint="iterate over the stream itself, or move the model to one device",
                )
            if stream is not None:  # a stream of its own: a mapping's tensor may be freed before it is read
                local_of(value).record_stream(stream)
            filler.fill_batch(batch, value, bucket)
        filler.flush()

    @torch.no_grad()
    def _begin(self) -> tuple[Filler, StatePass]:
        """Start a pass once all ranks agree on the call, the plan, the placements, and an unchanged state."""
        state = StatePass(self._state, self._contents, self._left_out)
        try:
            agree("stream", [*self._call, str(state.problem)], self._placements)
        except ParallelError:
            if state.problem is None:
                raise
        if state.problem is not None:
            raise state.problem
        merger = Merger(self._pairs, self._alpha, state.tensor) if self._lora == "merged" else None
        return Filler(self._kernel, keeps=self.keeps, merger=merger), state

    def _end(self, state: StatePass, *, stopped: bool, failure: UsageError | None = None) -> None:
        """End a pass on all ranks; one of them may have stopped it before its end, or failed there."""
        problem: UsageError | InputError | None = failure
        if not stopped:
            try:
                state.finish()
            except InputError as error:  # the other ranks must not wait for this one
                problem = error
        who = ranks_where(stopped or problem is not None, self._meshes)
        if problem is not None:
            raise problem
        if who and not stopped:
            raise ParallelError(
                f"rank {', '.join(map(str, who))} stopped the pass before its end",
                expected="every rank to take all tensors",
                hint="read the first error in that rank's log; then start the next pass on all ranks",
            )


def _fresh(item: Item, state: StatePass, filler: Filler) -> torch.Tensor:
    value = state.tensor(item.origin)
    out = torch.empty(item.shape, dtype=getattr(torch, item.dtype.name), device=local_of(value).device)
    filler.fill(item, value, out)
    filler.flush()
    return out
