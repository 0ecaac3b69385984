"""One tensor on its way into the hf layout: a copy, a view of a DTensor, gathered from all ranks, or a destination."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations, entries
from gemma4_moe.distributed.collectives import STAGING_BYTES, gather
from gemma4_moe.distributed.placements import convert_view, local_of, placed, placed_on
from gemma4_moe.errors import UsageError
from gemma4_moe.kernels import transpose_scale_cast
from gemma4_moe.layout.table import Operation, converted_shape
from gemma4_moe.layout.targets import hf_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry

    #: Says whether an entry is left out, by its hf name and its nemo name.
    Excluded = Callable[[str, str], bool]
    Pairs = Iterator[tuple[str, Any]]


def excluding(regex: str | None) -> Excluded:
    """Return what leaves out the entries whose hf or nemo name `regex` matches at its start.

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


@dataclass(frozen=True, slots=True)
class IntoHf:
    """How tensors go into the hf layout. Each method yields hf names and values for one entry.

    Attributes:
        kernel: The kernel that converts.
        mesh: What plain values may be a rank's part on.
        excluded: Says of an hf and a nemo name that the entry is left out.
        staging_bytes: The most bytes of staging that a gather takes.
    """

    kernel: str
    mesh: DeviceMesh | None
    excluded: Excluded
    staging_bytes: int = STAGING_BYTES

    def as_sharded(self, entry: Entry) -> Pairs:
        """Yield tensors as they lie: a copy of a whole tensor, a view of a DTensor. Nothing communicates."""
        for hf, value in self._wanted(entry):
            yield hf, self._as_it_lies(hf, value, entry)

    def as_gathered(self, entry: Entry) -> Pairs:
        """Yield whole tensors; each rank puts its own part into hf layout before it is gathered."""
        parsed = entry.parsed
        for hf, value in self._wanted(entry):
            if not isinstance(value, DTensor):
                yield hf, self._as_it_lies(hf, value, entry)
            elif parsed is None or parsed.rule.operation is Operation.KEEP:
                yield hf, value.full_tensor()
            elif hf != parsed.hf:
                yield hf, torch.ones(value.shape[:1], dtype=value.dtype, device=local_of(value).device)
            else:
                operation = parsed.rule.operation
                where = placed(value, entry.name).converted(operation, value.ndim)
                shape = converted_shape(operation, entry.shape)
                part = transpose_scale_cast(local_of(value), kernel=self.kernel)
                yield hf, part.new_empty(shape) if part.is_meta else gather(part, where, shape, self.staging_bytes)

    def as_destinations(self, entry: Entry) -> Pairs:
        """Yield destinations: views of the model's own storage, and scales that say "not loaded"."""
        parsed = entry.parsed
        for hf, value in self._wanted(entry):
            if parsed is None or parsed.rule.operation is Operation.KEEP:
                yield hf, value
            elif hf != parsed.hf:
                yield hf, destinations.mark(_unfilled_scale(value, entry.name), entry.value)
            elif isinstance(value, DTensor):
                yield hf, destinations.mark(convert_view(value, parsed.rule.operation, entry.name), entry.value)
            else:
                yield hf, destinations.mark(value.detach().transpose(-1, -2), entry.value)

    def _as_it_lies(self, hf: str, value: Any, entry: Entry) -> Any:
        parsed = entry.parsed
        if parsed is None or parsed.rule.operation is Operation.KEEP:
            return value
        if hf != parsed.hf:
            return _ones(value, entry.name)
        if isinstance(value, DTensor):
            return convert_view(value, parsed.rule.operation, entry.name)
        return transpose_scale_cast(value.detach(), kernel=self.kernel)

    def _wanted(self, entry: Entry) -> Pairs:
        """Yield each hf name that is not left out, with the native value; a value that nobody wants is not read."""
        names = [hf for hf in hf_names(entry.parsed, entry.name) if not self.excluded(hf, entry.name)]
        value = self._on_mesh(entry) if names else None
        yield from ((hf, value) for hf in names)

    def _on_mesh(self, entry: Entry) -> Any:
        """Return a plain part of a tensor as a DTensor, a lazy value read, others as they are."""
        value = entries.kept(entry.value)
        is_part = isinstance(value, torch.Tensor) and tuple(value.shape) != entry.shape
        if self.mesh is None or not is_part:
            return value
        return placed_on(self.mesh, entry.name).wrap(value, entry.shape)


def _ones(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return the scale [E] of ones of a native `down_projs`, sharded as its experts are."""
    local = local_of(value)
    return _beside_experts(torch.ones(local.shape[:1], dtype=value.dtype, device=local.device), value, name)


def _unfilled_scale(value: torch.Tensor, name: str) -> torch.Tensor:
    return _beside_experts(destinations.unfilled_scale(local_of(value)), value, name)


def _beside_experts(scale: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    """Return this rank's scale as a DTensor that is sharded as the experts of `value`, if that is one."""
    return placed(value, name).of_experts().wrap(scale, value.shape[:1]) if isinstance(value, DTensor) else scale
