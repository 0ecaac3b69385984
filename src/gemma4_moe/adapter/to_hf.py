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
from gemma4_moe.distributed.collectives import STAGING_BYTES, agree_by_mesh, gather
from gemma4_moe.distributed.placements import local_of, placed, placed_on, transposed_view
from gemma4_moe.errors import UsageError
from gemma4_moe.kernels import scale_cast, transpose_scale_cast
from gemma4_moe.layout.table import Operation, converted_shape
from gemma4_moe.layout.targets import hf_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry

    #: Returns whether an entry is left out, given its hf name and its nemo name.
    Excluded = Callable[[str, str], bool]

Form = Literal["sharded", "gathered", "destinations"]


@dataclass(frozen=True, slots=True)
class ToHf:
    """Converts entries of a nemo state dict into tensors of the hf layout.

    Attributes:
        kernel: The kernel that converts.
        mesh: The mesh over which plain values may be sharded.
        excluded: Whether an hf name, given with its nemo name, is left out.
        form: "sharded" keeps each tensor's placements, without communication. "gathered" gives whole tensors.
            "destinations" gives views for a checkpoint reader to fill.
        staging_bytes: The most bytes of staging that a gather takes.
    """

    kernel: str
    mesh: DeviceMesh | None
    excluded: Excluded
    form: Form
    staging_bytes: int = STAGING_BYTES

    def convert(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Any]]:
        """Yield (hf name, value) in the order of the entries; ranks that gather agree first."""
        if self.form == "gathered":
            entries = list(entries)
            agree_by_mesh("convert", self.staging_bytes, self._collectives(entries))
        for entry in entries:
            wanted = self._wanted(entry)
            value = self._on_mesh(entry) if wanted else None  # a value that nobody wants is not read
            for hf, operation in wanted:
                yield hf, self._converted(operation, value, entry)
            del entry, value  # or it would stay alive while the next one is made

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
        loading = self.form == "destinations"
        if self.form == "gathered" and isinstance(value, DTensor):
            return self._gathered(operation, value, entry)
        if operation is Operation.KEEP:
            return value
        local = local_of(value)
        if operation is Operation.FOLD:
            scale = destinations.unfilled_scale(local) if loading else convert_block(operation, local)
            if isinstance(value, DTensor):
                scale = placed(value, entry.name).of_experts().wrap(scale, value.shape[:1])
            return destinations.mark(scale, entry.value) if loading else scale
        if loading:
            return destinations.mark(transposed_view(value, entry.name), entry.value)
        if isinstance(value, DTensor):
            return transposed_view(value, entry.name)
        return convert_block(operation, local, kernel=self.kernel)

    def _gathered(self, operation: Operation, value: DTensor, entry: Entry) -> torch.Tensor:
        """Return the whole tensor, gathered from shards that are in hf layout already."""
        if operation is Operation.KEEP:
            return value.full_tensor()
        if operation is Operation.FOLD:
            return torch.ones(value.shape[:1], dtype=value.dtype, device=local_of(value).device)
        where = placed(value, entry.name).converted(operation, value.ndim)
        shape = converted_shape(operation, entry.shape)
        shard = convert_block(operation, local_of(value), kernel=self.kernel)
        return shard.new_empty(shape) if shard.is_meta else gather(shard, where, shape, self.staging_bytes)


def convert_block(
    operation: Operation,
    native: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Return a block of a native tensor in hf layout.

    Args:
        operation: The operation between the native and the hf tensor. FOLD gives the scale [E] of `native` [E, I, H],
            which is ones.
        native: The native values, a plain tensor: [E, R, C] or [R, C] if the operation exchanges axes, else any shape.
        dtype: Dtype of the result; by default that of `out`, or else that of `native`.
        out: Where to write the result. By default new memory; for KEEP in its own dtype `native` itself.
        kernel: The kernel that converts.
    """
    into = dtype or (native if out is None else out).dtype
    if operation is Operation.FOLD:
        return torch.ones(native.shape[:1], dtype=into, device=native.device) if out is None else out.fill_(1)
    if operation is Operation.KEEP and native.dtype == into:
        return native if out is None else out.copy_(native)
    if operation is Operation.KEEP and native.ndim == 0:  # the kernels take at least one axis
        out = None if out is None else out.view(1)
        return convert_block(operation, native.view(1), dtype=dtype, out=out, kernel=kernel).view(())
    convert = scale_cast if operation is Operation.KEEP else transpose_scale_cast
    converted: torch.Tensor = convert(native, dtype=dtype, out=out, kernel=kernel)
    return converted


def excluding(regex: str | None) -> Excluded:
    """Return a function that tells whether `regex` matches an hf or a nemo name.

    Names are matched at their start, by `re.match`.

    Raises:
        UsageError: It is not a regular expression.
    """
    if regex is None:
        return lambda _hf, _nemo: False
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError("exclude_key_regex is not a regular expression", found=regex, hint=str(error)) from error
    return lambda hf, nemo: pattern.match(hf) is not None or pattern.match(nemo) is not None


def _is_shard(value: Any, entry: Entry) -> bool:
    """Return whether a value is a plain tensor and only a shard."""
    return isinstance(value, torch.Tensor) and tuple(value.shape) != entry.shape
