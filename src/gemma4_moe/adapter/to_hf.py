"""From the nemo layout to the hf layout: each entry's hf tensors and their conversion.

Read it from the top: `ToHf.convert` goes through the entries, `ToHf._converted` has each operation's conversion for
results that are sharded, gathered, or destinations of a load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations
from gemma4_moe.distributed.collectives import agree
from gemma4_moe.distributed.gathering import Gatherer
from gemma4_moe.distributed.packing import copy
from gemma4_moe.distributed.placements import local_of, placed, placed_on, transposed_view
from gemma4_moe.errors import UsageError
from gemma4_moe.kernels import transpose_scale_cast
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import Layout, Operation, converted_shape
from gemma4_moe.layout.targets import hf_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry

    #: Returns whether an entry is left out, given its hf name and its nemo name.
    Excluded = Callable[[str, str], bool]

#: The form of the results. "sharded": each tensor keeps its placements, and nothing communicates. "gathered": each is
#: whole on every rank. "destinations": views that a checkpoint reader fills.
Form = Literal["sharded", "gathered", "destinations"]


@dataclass(frozen=True, slots=True)
class ToHf:
    """Converts entries of a nemo state dict into tensors of the hf layout."""

    kernel: str
    mesh: DeviceMesh | None  # over which plain values may be sharded
    excluded: Excluded
    form: Form
    staging_bytes: int  # at most, in a gather on a CPU

    def convert(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Any]]:
        """Yield (hf name, value) in the order of the entries; ranks that gather agree first."""
        if self.form == "gathered":
            yield from self._gathered(list(entries))
            return
        for entry in entries:
            wanted = self._wanted(entry)
            value = self._on_mesh(entry) if wanted else None  # a value that nobody wants is not read
            for hf, operation in wanted:
                yield hf, self._converted(operation, value, entry)
            del entry, value  # or it would stay alive while the next one is made

    @torch.no_grad()
    def _gathered(self, entries: list[Entry]) -> list[tuple[str, Any]]:
        """Return (hf name, value), with every shard made whole."""
        agree("convert", self.staging_bytes, self._collectives(entries))
        gatherer, results = Gatherer(self.staging_bytes), []
        for entry in entries:
            wanted = self._wanted(entry)
            value = self._on_mesh(entry) if wanted else None
            for hf, operation in wanted:
                if isinstance(value, DTensor):
                    results.append((hf, self._whole(operation, value, entry, gatherer)))
                else:
                    results.append((hf, self._converted(operation, value, entry)))
        gatherer.finish()
        return results

    def leaves_out(self, name: str) -> bool:
        """Return whether an entry becomes nothing."""
        return left_out(name, self.excluded)

    def _wanted(self, entry: Entry) -> list[tuple[str, Operation]]:
        return [pair for pair in hf_tensors(entry.parsed, entry.name) if not self.excluded(pair[0], entry.name)]

    def _collectives(self, entries: Iterable[Entry]) -> Iterator[tuple[DeviceMesh, Any]]:
        """Yield the mesh of each gathered value, and all that decides its collectives."""
        for entry in entries:
            value, wanted = entry.value, [hf for hf, _ in self._wanted(entry)]
            if isinstance(value, DTensor) and not value.is_meta:
                placements = str(value.placements)
                yield value.device_mesh, [entry.name, wanted, list(entry.shape), placements, str(value.dtype)]
            elif self.mesh is not None and _is_shard(value, entry):
                yield self.mesh, [entry.name, wanted, list(entry.shape), "a shard", str(value.dtype)]

    def _on_mesh(self, entry: Entry) -> Any:
        """Return an entry's value; a plain shard is returned as a DTensor."""
        value = entry.read()
        if self.mesh is None or not _is_shard(value, entry):
            return value
        return placed_on(self.mesh, entry.name).wrap(value, entry.shape)

    def _converted(self, operation: Operation, value: Any, entry: Entry) -> Any:
        if operation is Operation.KEEP:
            return value
        local, loading = local_of(value), self.form == "destinations"
        if operation is Operation.FOLD:
            if loading:
                scale = destinations.unfilled_scale(len(local), local.device)
            else:
                scale = torch.ones(len(local), dtype=local.dtype, device=local.device)
            if isinstance(value, DTensor):
                scale = placed(value, entry.name).of_experts().wrap(scale, value.shape[:1])
            return destinations.mark(scale, entry.value) if loading else scale
        if not loading and not isinstance(value, DTensor):
            return transpose_scale_cast(local, kernel=self.kernel)
        view = transposed_view(value, entry.name)
        return destinations.mark(view, entry.value) if loading else view

    def _whole(self, operation: Operation, value: DTensor, entry: Entry, gatherer: Gatherer) -> torch.Tensor:
        """Return memory for a DTensor's whole hf tensor, which is complete once `gatherer` has finished."""
        local, where = local_of(value), placed(value, entry.name)
        if operation is Operation.FOLD:
            return torch.ones(value.shape[:1], dtype=local.dtype, device=local.device)
        if operation is Operation.KEEP and not where.is_cut:
            return local
        shape = converted_shape(operation, tuple(value.shape))
        whole = torch.empty(shape, dtype=local.dtype, device=local.device)
        if not local.is_meta:
            gatherer.add(local, where, whole, copy if operation is Operation.KEEP else self._transpose, operation)
        return whole

    def _transpose(self, native: torch.Tensor, out: torch.Tensor) -> None:
        transpose_scale_cast(native, out=out, kernel=self.kernel)


def excluding(regex: str | None) -> Excluded:
    """Return a function that tells whether `regex` matches an hf or a nemo name."""
    if regex is None:
        return lambda _hf, _nemo: False
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError("exclude_key_regex is not a regular expression", found=regex, hint=str(error)) from error
    return lambda hf, nemo: pattern.match(hf) is not None or pattern.match(nemo) is not None


def left_out(name: str, excluded: Excluded) -> bool:
    """Return whether every hf tensor of the entry `name`, of either layout, is excluded."""
    found = lookup(name, Layout.NEMO)
    if found is not None:
        return all(excluded(hf, name) for hf, _ in hf_tensors(found, name))
    found = lookup(name, Layout.HF)
    return excluded(name, name if found is None else found.nemo)


def _is_shard(value: Any, entry: Entry) -> bool:
    """Return whether a value is a plain tensor and only a shard."""
    return isinstance(value, torch.Tensor) and tuple(value.shape) != entry.shape
