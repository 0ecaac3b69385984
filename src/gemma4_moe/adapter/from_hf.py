"""One expert tensor on its way into the nemo layout: whole, a rank's part of it, lazily read, or loaded in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations
from gemma4_moe.distributed.placements import Placed, local_of, placed, placed_on, take
from gemma4_moe.distributed.sharding import overlaps
from gemma4_moe.errors import IncompleteExpertsError, ParallelError, TensorShapeError, UsageError
from gemma4_moe.kernels import scale_in_place, transpose_scale_cast
from gemma4_moe.layout.dtypes import require_expert_dtype
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import SCALE, Layout, Operation, converted_shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry
    from gemma4_moe.layout.inventory import Inventory
    from gemma4_moe.layout.names import LayerKey, MoEName


class Factors:
    """Brings each expert tensor together with the scale that multiplies it, in whatever order they come."""

    def __init__(self) -> None:
        self._scales: dict[LayerKey, Entry] = {}
        self._waiting: dict[LayerKey, list[Entry]] = {}

    def pairs(self, entry: Entry) -> list[tuple[Entry, Entry | None]]:
        """Take an expert tensor or a scale, and return all expert tensors that can be converted now, with the scale."""
        name = entry.parsed
        assert name is not None, "an expert tensor or a scale"
        key = name.layer_key
        if name.rule.operation is Operation.FOLD:
            waiting = self._waiting.pop(key, [])
            if all(value.parsed is not None and value.parsed.part != WHOLE for value in waiting):
                self._scales[key] = entry  # more may come
            return [(value, entry) for value in waiting]
        if name.rule.factor is None:
            return [(entry, None)]
        if key not in self._scales:
            self._waiting.setdefault(key, []).append(entry)
            return []
        return [(entry, self._scales.pop(key) if name.part == WHOLE else self._scales[key])]


@dataclass(frozen=True, slots=True)
class IntoNemo:
    """How tensors go into the nemo layout.

    Attributes:
        kernel: The kernel that converts.
        dtype: Dtype of new expert tensors.
        mesh: What plain values are sharded over; None keeps them whole.
        out: Native tensors to write into, by name, instead of making new ones.
    """

    kernel: str
    dtype: torch.dtype
    mesh: DeviceMesh | None
    out: Mapping[str, torch.Tensor] | None

    def fill(self, result: dict[str, Any], value: Entry, scale: Entry | None, inventory: Inventory) -> None:
        """Convert an expert tensor into `result`, a state dict in the nemo layout."""
        name = value.parsed
        assert name is not None, "an expert tensor"
        if name.part == WHOLE:
            result[name.nemo] = self.expert(name, value, scale)
        else:
            sizes = inventory.sizes(name.prefix)
            result[name.nemo] = self.part(name, value, scale, result.get(name.nemo), sizes)

    def expert(self, name: MoEName, value: Entry, scale: Entry | None) -> torch.Tensor:
        """Return the native tensor of one row: made new, written to `out`, or the model's own, finished in place.

        Args:
            name: The row and its layer.
            value: gate_up_proj [E, 2I, H] or down_proj [E, H, I].
            scale: per_expert_scale [E] for down_proj, else None.
        """
        loaded = destinations.native_of(value.value)
        if loaded is not None and self.out is not None:
            raise UsageError(
                "a destination can't be written to `out`: it is the model's own storage",
                tensor=name.nemo,
                hint="leave `out` out where destinations are finished",
            )
        if loaded is not None:
            return loaded if scale is None else _folded_in_place(name, loaded, scale.value, self.kernel)
        operation, ndim = name.rule.operation, len(value.shape)
        shape = converted_shape(operation, value.shape)
        target = None if self.out is None else out_tensor(self.out, name.nemo, shape)
        if target is not None:
            require_expert_dtype(name.nemo, str(target.dtype), "hold the experts in one of these dtypes")
        where = self._where(name, value, target)
        if where is None:
            part, factor = _whole(value), None if scale is None else _whole(scale)
        else:
            part = _part(value, where)
            factor = None if scale is None else _part(scale, where.of_experts())
        if target is not None:
            transpose_scale_cast(part, scale=factor, out=local_of(target), kernel=self.kernel)
            return target
        made: torch.Tensor = transpose_scale_cast(part, scale=factor, dtype=self.dtype, kernel=self.kernel)
        return made if where is None else where.converted(operation, ndim).wrap(made, shape)

    def part(
        self, name: MoEName, value: Entry, scale: Entry | None, native: torch.Tensor | None, sizes: Mapping[str, int]
    ) -> torch.Tensor:
        """Write one of the several tensors of a role to its place in the native tensor, and return that.

        Args:
            name: The row, its layer, and what the value holds of it.
            value: The tensor: [r, C], or [E, r, C].
            scale: per_expert_scale [E] for down_proj, else None.
            native: The native tensor if an earlier part has made it.
            sizes: What is known of E, H and I.

        Raises:
            ParallelError: The value or its scale is a DTensor.
            UsageError: The number of experts is not known yet.
        """
        for entry in (value, scale):
            if entry is not None and isinstance(entry.value, DTensor):
                raise ParallelError(
                    "a DTensor in a checkpoint that has several tensors for a role",
                    tensor=entry.name,
                    expected="whole tensors, of which each rank takes its own part",
                    found=str(entry.value.placements),
                    hint="give plain tensors and `device_mesh` or `out`",
                )
        if "E" not in sizes:
            raise UsageError(
                "the number of experts is not known when the first expert comes",
                tensor=value.name,
                hint="give the adapter a moe_config, or from_hf a mapping instead of an iterator",
            )
        shape = shape_of(name.rule, Layout.NEMO, dict(sizes))
        if native is None:
            native = self._empty(name, value, shape)
        runs = (
            placed(native, name.nemo).runs(shape) if isinstance(native, DTensor) else tuple((range(n),) for n in shape)
        )
        local, factors = local_of(native), None if scale is None else _whole(scale)
        first_expert, first_row = name.part.experts(shape[0])[0], name.part.rows(shape[2])[0]
        for held, experts in overlaps(runs[0], *name.part.experts(shape[0])):
            for columns, rows in overlaps(runs[2], *name.part.rows(shape[2])):
                wanted = [[_less(experts, first_expert)], [_less(rows, first_row)], runs[1]]
                piece = take(value.value, wanted if len(value.shape) == 3 else wanted[1:])
                transpose_scale_cast(
                    piece.view(-1, *piece.shape[-2:]).to(local.device),
                    scale=None if factors is None else factors[experts.start : experts.stop].to(local.device),
                    out=local[held, :, columns],
                    kernel=self.kernel,
                )
        return native

    def _empty(self, name: MoEName, value: Entry, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the native tensor of a row without values: that of `out`, or a new one, sharded over the mesh."""
        if self.out is not None:
            target = out_tensor(self.out, name.nemo, shape)
            require_expert_dtype(name.nemo, str(target.dtype), "hold the experts in one of these dtypes")
            return target
        if self.mesh is None:
            device = value.value.device if isinstance(value.value, torch.Tensor) else None
            return torch.empty(shape, dtype=self.dtype, device=device)
        where = placed_on(self.mesh, name.nemo)
        local = torch.empty(where.local_shape(shape), dtype=self.dtype, device=self.mesh.device_type)
        return where.wrap(local, shape)

    def kept(self, native: str, value: Any) -> Any:
        """Return a value that is the same in both layouts: the same object, or copied to its place in `out`."""
        if self.out is None or not isinstance(value, torch.Tensor):
            return value
        target = out_tensor(self.out, native, tuple(value.shape))
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            local_of(target).copy_(take(value, placed(target, native).runs(value.shape)))
        else:
            target.detach().copy_(value.detach())
        return target

    def _where(self, name: MoEName, value: Entry, target: torch.Tensor | None) -> Placed | None:
        """Return where the parts of an hf tensor are to be: its own placements, the target's, or the mesh's."""
        operation, ndim = name.rule.operation, len(value.shape)
        wanted = placed(target, name.nemo).converted(operation, ndim) if isinstance(target, DTensor) else None
        if isinstance(value.value, DTensor):
            found = placed(value.value, value.name)
            if target is not None and found != wanted:
                raise ParallelError(
                    "a DTensor and the tensor to write it into lie differently",
                    tensor=value.name,
                    expected=str(wanted),
                    found=str(found),
                    hint="redistribute one of them, or give the tensor whole",
                )
            return found
        if wanted is not None:
            return wanted
        if self.mesh is None or target is not None:
            return None
        return placed_on(self.mesh, value.name).converted(operation, ndim)


def out_tensor(out: Mapping[str, torch.Tensor], native: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of `out` that takes `native` in.

    Raises:
        UsageError: There is none.
        TensorShapeError: It has another shape.
    """
    if native not in out:
        raise UsageError(
            "no tensor to write into",
            tensor=native,
            expected="its nemo name in `out`",
            hint="give `out` every tensor of the state dict",
        )
    if tuple(out[native].shape) != shape:
        raise TensorShapeError(
            "the tensor to write into has another shape",
            tensor=native,
            expected=list(shape),
            found=list(out[native].shape),
            hint="give `out` the tensors of the same model",
        )
    return out[native]


def _less(indices: range, offset: int) -> range:
    return range(indices.start - offset, indices.stop - offset)


def _whole(entry: Entry) -> torch.Tensor:
    whole: torch.Tensor = entry.value.detach() if isinstance(entry.value, torch.Tensor) else entry.value[...]
    return whole


def _part(entry: Entry, where: Placed) -> torch.Tensor:
    """Return this rank's part of a tensor that is whole, lazy, already a part, or a DTensor, on the mesh's device."""
    value = entry.value
    if isinstance(value, DTensor):
        found = placed(value, entry.name)
        if found == where:
            return local_of(value)
        if any(placement is not None for placement in found.placements):
            raise ParallelError(
                "a DTensor that lies differently from the experts it belongs to",
                tensor=entry.name,
                expected=str(where),
                found=str(found),
                hint="redistribute it, or give it whole",
            )
        part = take(local_of(value), where.runs(entry.shape))
    elif isinstance(value, torch.Tensor) and tuple(value.shape) != entry.shape:
        part = value.detach()
    else:
        part = take(value, where.runs(entry.shape))
    return part if part.is_meta else part.to(where.mesh.device_type)


def _folded_in_place(name: MoEName, native: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
    """Multiply a loaded `down_projs` by its loaded scale, and leave ones there: a second time changes nothing."""
    factor = local_of(scale)
    missing = int(torch.isnan(factor).sum())
    if missing:
        raise IncompleteExpertsError(
            "Incomplete expert weights: a destination was not loaded",
            tensor=name.sibling(SCALE).hf,
            expected="a scale for each expert",
            found=f"NaN for {missing} of {factor.numel()} experts",
            hint="load the checkpoint into all destinations before from_hf, and check that it holds the scale",
        )
    scale_in_place(local_of(native), factor, kernel=kernel)
    factor.fill_(1)
    return native
