"""From the hf layout to the nemo layout: entries are paired with their scales, then converted.

Read it from the top: `FromHf.convert` goes through the entries, `FromHf._expert` makes one native expert tensor, in
new memory, in `out`, or in the model's own storage that a reader has filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import destinations
from gemma4_moe.adapter.parts import write_part
from gemma4_moe.distributed.placements import Placed, local_of, placed, placed_on, take
from gemma4_moe.errors import IncompleteExpertsError, InputError, ParallelError, TensorShapeError, UsageError
from gemma4_moe.kernels import scale_in_place, transpose_scale_cast
from gemma4_moe.layout.dtypes import require_expert_dtype
from gemma4_moe.layout.spellings import WHOLE
from gemma4_moe.layout.table import SCALE, Layout, Operation, converted_shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry
    from gemma4_moe.layout.inventory import Inventory
    from gemma4_moe.layout.names import LayerKey, MoEName


@dataclass(frozen=True, slots=True)
class FromHf:
    """Converts entries of an hf state dict into tensors of the nemo layout."""

    kernel: str
    dtype: torch.dtype  # of new expert tensors
    mesh: DeviceMesh | None  # over which plain values are to be sharded, or are a rank's shards of; None for whole ones
    out: Mapping[str, torch.Tensor] | None  # native tensors, by nemo name, to write into instead of new ones

    def convert(self, entries: Iterable[Entry], inventory: Inventory) -> Iterator[tuple[str, Any]]:
        """Yield (nemo name, value); down_projs follow once both down_proj and its scale were given.

        A native tensor that is made from several parts is yielded with each of them.
        """
        pairing, natives = _Pairing(), dict[str, torch.Tensor]()
        for entry in entries:
            parsed = entry.parsed
            if parsed is None or entry.operation is Operation.KEEP:
                nemo = entry.name if parsed is None else parsed.nemo
                yield nemo, self._kept(nemo, entry.read())
            else:
                for name, expert, scale in pairing.ready(parsed, entry):
                    if name.part == WHOLE:
                        yield name.nemo, self._expert(name, expert, scale)
                    else:
                        if name.nemo not in natives:
                            natives[name.nemo] = self._empty(name, expert, inventory)
                        write_part(natives[name.nemo], expert, scale, self.kernel)
                        yield name.nemo, natives[name.nemo]
                    del expert, scale
            del entry  # or its value would stay alive while the next one is made

    def _kept(self, nemo: str, value: Any) -> Any:
        """Return a value that both layouts share: the same object, or copied into `out`."""
        if self.out is None or not isinstance(value, torch.Tensor):
            return value
        target = _out_tensor(self.out, nemo, tuple(value.shape))
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            local_of(target).copy_(take(value, placed(target, nemo).runs(value.shape)))
        else:
            target.detach().copy_(value.detach())
        return target

    def _expert(self, name: MoEName, expert: Entry, scale: Entry | None) -> torch.Tensor:
        """Return the native tensor of gate_up_proj [E, 2I, H] or of down_proj [E, H, I]."""
        loaded = destinations.native_of(expert.value)
        if loaded is not None and self.out is not None:
            problem = "a destination can't be written to `out`: it is the model's own storage"
            raise UsageError(problem, tensor=name.nemo, hint="give no `out` with destinations")
        if loaded is not None:
            return loaded if scale is None else _folded_in_place(name, loaded, scale.value, self.kernel)
        operation = name.rule.operation
        shape = converted_shape(operation, expert.shape)
        target = self._target(name, shape)
        where = self._placed(name, expert, target)
        values = _shard(expert, where)
        factor = None if scale is None else _shard(scale, where and where.of_experts())
        if target is not None:
            transpose_scale_cast(values, scale=factor, out=local_of(target), kernel=self.kernel)
            return target
        made: torch.Tensor = transpose_scale_cast(values, scale=factor, dtype=self.dtype, kernel=self.kernel)
        return made if where is None else where.converted(operation, len(shape)).wrap(made, shape)

    def _target(self, name: MoEName, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return the tensor of `out` for native experts, None without `out`."""
        if self.out is None:
            return None
        target = _out_tensor(self.out, name.nemo, shape)
        require_expert_dtype(name.nemo, str(target.dtype), "hold the experts in one of these dtypes")
        return target

    def _empty(self, name: MoEName, part: Entry, inventory: Inventory) -> torch.Tensor:
        """Return the native tensor that a part belongs to, without values: that of `out`, or a new one."""
        sizes = inventory.sizes(name.prefix)
        if "E" not in sizes:
            raise UsageError(
                "the number of experts is not known when the first expert comes",
                tensor=part.name,
                hint="give the adapter a moe_config, or give from_hf a mapping instead of an iterator",
            )
        shape = shape_of(name.rule, Layout.NEMO, sizes)
        target = self._target(name, shape)
        if target is not None:
            return target
        if self.mesh is None:
            device = part.value.device if isinstance(part.value, torch.Tensor) else None
            return torch.empty(shape, dtype=self.dtype, device=device)
        where = placed_on(self.mesh, name.nemo)
        local = torch.empty(where.local_shape(shape), dtype=self.dtype, device=self.mesh.device_type)
        return where.wrap(local, shape)

    def _placed(self, name: MoEName, expert: Entry, target: torch.Tensor | None) -> Placed | None:
        """Return an hf tensor's placements: its own, the target's, or the mesh's."""
        operation, ndim = name.rule.operation, len(expert.shape)
        wanted = placed(target, name.nemo).converted(operation, ndim) if isinstance(target, DTensor) else None
        if isinstance(expert.value, DTensor):
            found = placed(expert.value, expert.name)
            if target is not None and found != wanted:
                raise _misplaced(expert, "the tensor to write it into", wanted, found)
            return found
        if target is not None or self.mesh is None:
            return wanted
        return placed_on(self.mesh, expert.name).converted(operation, ndim)


class _Pairing:
    """Pairs of expert tensors and the scales that multiply them, in whatever order they come."""

    def __init__(self) -> None:
        self._scales: dict[LayerKey, Entry] = {}
        self._waiting: dict[LayerKey, list[tuple[MoEName, Entry]]] = {}

    def ready(self, name: MoEName, entry: Entry) -> list[tuple[MoEName, Entry, Entry | None]]:
        """Take in an expert tensor or a scale; return each expert tensor that can now be converted, with its scale."""
        key = name.layer_key
        if name.rule.operation is Operation.FOLD:
            waiting = self._waiting.pop(key, [])
            if all(expert.part != WHOLE for expert, _ in waiting):
                self._scales[key] = entry  # more parts may come
            return [(*expert, entry) for expert in waiting]
        if name.rule.factor is None:
            return [(name, entry, None)]
        if key not in self._scales:
            self._waiting.setdefault(key, []).append((name, entry))
            return []
        return [(name, entry, self._scales.pop(key) if name.part == WHOLE else self._scales[key])]


def _out_tensor(out: Mapping[str, torch.Tensor], nemo: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of `out` for a nemo name and a shape."""
    if nemo not in out:
        hint = "give `out` every tensor of the state dict"
        raise UsageError("no tensor to write into", tensor=nemo, expected="its nemo name in `out`", hint=hint)
    if tuple(out[nemo].shape) != shape:
        raise TensorShapeError(
            "the tensor to write into has another shape",
            tensor=nemo,
            expected=list(shape),
            found=list(out[nemo].shape),
            hint="give `out` the tensors of the same model",
        )
    return out[nemo]


def _shard(entry: Entry, where: Placed | None) -> torch.Tensor:
    """Return this rank's shard of an entry on the mesh's device; without `where` all of it.

    The entry's value may be whole, lazy, a shard already, or a DTensor of the same placements or of replicas.
    """
    value: Any = entry.read() if where is None else entry.value
    if where is None:
        return local_of(value)
    if isinstance(value, DTensor):
        found = placed(value, entry.name)
        if found == where:
            return local_of(value)
        if any(placement is not None for placement in found.placements):
            raise _misplaced(entry, "its layer's experts", where, found)
        value = local_of(value)
    is_whole = not isinstance(value, torch.Tensor) or tuple(value.shape) == entry.shape
    shard = take(value, where.runs(entry.shape)) if is_whole else value.detach()
    return shard if shard.is_meta else shard.to(where.mesh.device_type)


def _misplaced(entry: Entry, other: str, wanted: Placed | None, found: Placed) -> ParallelError:
    problem, hint = f"a DTensor whose placements differ from those of {other}", "redistribute it, or give it whole"
    return ParallelError(problem, tensor=entry.name, expected=str(wanted), found=str(found), hint=hint)


def _folded_in_place(name: MoEName, native: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
    """Multiply a loaded `down_projs` by its scale, and set the scale to one."""
    factor = local_of(scale)
    if missing := destinations.unfilled(factor):
        raise IncompleteExpertsError(
            "Incomplete expert weights: a destination was not loaded",
            tensor=name.sibling(SCALE).hf,
            expected="a scale for each expert",
            found=f"none for {missing} of {factor.numel()} experts",
            hint="load the checkpoint into all destinations before from_hf, and check that it holds the scale",
        )
    if wrong := int(torch.isnan(factor).sum()):
        raise InputError(
            "a per_expert_scale that is NaN in the checkpoint",
            tensor=name.sibling(SCALE).hf,
            expected="numbers",
            found=f"NaN for {wrong} of {factor.numel()} experts",
            hint="get the checkpoint again; gemma4_moe.load_hf loads it as it is, with NaN in these experts",
        )
    scale_in_place(local_of(native), factor, kernel=kernel)
    factor.fill_(1)  # so that a second call changes nothing
    return native
