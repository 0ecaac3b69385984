"""The state-dict adapter between the two layouts, in memory: whole dicts, and tensor by tensor.

    hf name                                  axes         nemo name                               axes
    P layers.L.experts.gate_up_proj          [E, 2I, H]   P layers.L.moe.experts.gate_and_up_projs [E, H, 2I]
    P layers.L.experts.down_proj             [E, H, I]    P layers.L.moe.experts.down_projs        [E, I, H]
    P layers.L.router.per_expert_scale       [E]          (folded into down_projs)

The table itself is in `layouts`; what an operation does to shapes in `transforms`; the arithmetic in `kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import entries
from gemma4_moe.adapter.configs import axis_sizes, conversion_of
from gemma4_moe.adapter.from_hf import Factors, IntoNemo
from gemma4_moe.adapter.interface import StateDict, StateDictAdapter
from gemma4_moe.adapter.to_hf import IntoHf, excluding
from gemma4_moe.distributed import collectives
from gemma4_moe.distributed.collectives import STAGING_BYTES, agree
from gemma4_moe.distributed.placements import expert_mesh, local_of, placed, placed_on, whole_shape
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, GATE_UP, Layout, Operation
from gemma4_moe.layout.targets import hf_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.device_mesh import DeviceMesh

    from gemma4_moe.adapter.entries import Entry


class Gemma4MoEStateDictAdapter(StateDictAdapter):
    """Convert Gemma 4 mixture-of-experts state dicts between the `hf` and the `nemo` layout.

    It has no state beyond its arguments: each call's answer depends on what it is given alone, and no input is
    modified unless it was handed over as `out` or as a destination.

    Args:
        config: The text config (or a multimodal one that holds it), read for H and I; None to learn both from the
            tensors.
        moe_config: Any object with `n_routed_experts`, E; None to learn it likewise.
        backend: Any object; its `conversion`, if it has one, names the kernel.
        dtype: Dtype of the native expert tensors that `from_hf` makes.
    """

    _supports_low_memory_dcp_load = True

    def __init__(self, config: Any, moe_config: Any, backend: Any, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.moe_config = moe_config
        self.backend = backend
        self.dtype = dtype
        axis_sizes(config, moe_config)
        conversion_of(backend)
        if str(dtype).removeprefix("torch.") not in {known.name for known in EXPERT_DTYPES}:
            raise UsageError(
                "no dtype for expert tensors",
                expected=", ".join(f"torch.{known.name}" for known in EXPERT_DTYPES),
                found=repr(dtype),
                hint="give the dtype in which the model holds its experts",
            )

    def from_hf(
        self,
        hf_state_dict: StateDict,
        device_mesh: DeviceMesh | None = None,
        *,
        out: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the state dict in the nemo layout.

        Expert tensors become new tensors of the adapter's dtype: `gate_and_up_projs` [E, H, 2I] and `down_projs`
        [E, I, H] = down_proj transposed × per_expert_scale, the product in fp32, rounded once. All other tensors pass
        as the same objects. Destinations made by `to_hf(for_checkpoint_load=True)` are finished in place.

        Args:
            hf_state_dict: A mapping, or an iterable of (name, tensor) that is consumed tensor by tensor. A value may
                be lazy, as the slices of safetensors are: anything with `get_shape` and `__getitem__`.
            device_mesh: The mesh over which plain tensors are sharded, or are this rank's parts of; the results are
                DTensors. DTensors know their own mesh.
            out: Native tensors to write into, by nemo name, instead of making new ones. Their dtype and, where they
                are DTensors, their placements decide.
            **kwargs: What a framework hands to every adapter; without effect here.

        Raises:
            IncompleteExpertsError: A layer lacks gate_up_proj, down_proj or per_expert_scale.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
            ParallelError: A mesh or a placement that is not known, or tensors of one layer that lie differently.
        """
        del kwargs
        mesh = expert_mesh(device_mesh)
        into_nemo = IntoNemo(conversion_of(self.backend), self.dtype, mesh, out)
        result: dict[str, Any] = {}
        inventory, factors = self._inventory(Layout.HF), Factors()
        for entry in entries.explained(hf_state_dict, inventory, mesh):
            parsed = entry.parsed
            if parsed is None or parsed.rule.operation is Operation.KEEP:
                native = entry.name if parsed is None else parsed.nemo
                result[native] = into_nemo.kept(native, entries.kept(entry.value))
            else:
                for value, scale in factors.pairs(entry):
                    into_nemo.fill(result, value, scale, inventory)
                    del value, scale
            del entry  # or its value would stay alive while the next one is made
        return result

    def to_hf(
        self,
        state_dict: StateDict,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        device_mesh: DeviceMesh | None = None,
        for_checkpoint_load: bool = False,
        gather: bool = False,
        staging_bytes: int = STAGING_BYTES,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the state dict in the hf layout, `per_expert_scale` as ones.

        Args:
            state_dict: A mapping or an iterable of (name, tensor) in the nemo layout.
            exclude_key_regex: Leave out what this matches (`re.match`) by its hf name or by its nemo name; the nemo
                name of the scale is that of `down_projs`.
            quantization: Must be False: quantised output is not supported.
            device_mesh: The mesh of plain local shards; DTensors know their own.
            for_checkpoint_load: Return destinations instead of copies: transposed views of the given tensors'
                storage for a checkpoint reader to fill, and an fp32 scale full of NaN, both for `from_hf` to finish.
                The NaN alone says "not loaded": `from_hf` refuses a layer whose scale the reader did not fill. The
                views hold the model's own values, which `to_hf` leaves as they are; where a reader skips one of
                them, nothing here can tell, and the reader itself must report it.
            gather: Return whole tensors on every rank. All ranks of the tensors' meshes must call; they agree on what
                to do first.
            staging_bytes: The most bytes of staging that a gather takes.
            **kwargs: What a framework hands to every adapter; without effect here.

        Returns:
            hf names and tensors in the order of the input. Whole expert tensors become contiguous ones of the input's
            dtype on its device; without `gather`, DTensors become DTensors that view the same storage, and a plain
            local shard one that copies nothing. All other tensors are the same objects.

        Raises:
            IncompleteExpertsError: A layer has only one of its two expert tensors.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
            ParallelError: Ranks disagree, a collective failed, or a placement is not known.
            UsageError: `quantization` is asked for, or both `gather` and `for_checkpoint_load`.
        """
        del kwargs
        _refuse_quantization(quantization)
        if gather and for_checkpoint_load:
            raise UsageError(
                "a destination can't be gathered",
                expected="gather or for_checkpoint_load",
                found="both",
                hint="leave one of them out",
            )
        mesh, excluded = expert_mesh(device_mesh), excluding(exclude_key_regex)
        found: Iterable[Entry] = entries.explained(
            state_dict, self._inventory(Layout.NEMO), mesh, lambda name: excluded(name, name)
        )
        if gather:
            found = list(found)
            _agree(found, mesh, excluded, staging_bytes)
        into_hf = IntoHf(conversion_of(self.backend), mesh, excluded, staging_bytes)
        result: dict[str, Any] = {}
        for entry in found:
            if gather:
                result.update(into_hf.as_gathered(entry))
            elif for_checkpoint_load:
                result.update(into_hf.as_destinations(entry))
            else:
                result.update(into_hf.as_sharded(entry))
            del entry  # or its value would stay alive while the next one is made
        return result

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: Any,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        device_mesh: DeviceMesh | None = None,
        **kwargs: Any,
    ) -> list[tuple[str, Any]]:
        """Return one native tensor as (hf name, whole tensor): two pairs for `down_projs`, which carries the scale.

        A DTensor, or a plain shard beside `device_mesh`, is gathered: all ranks of its mesh must call. A tensor on the
        meta device gives meta tensors, and nothing communicates. Arguments and errors are those of `to_hf`.
        """
        del kwargs
        _refuse_quantization(quantization)
        mesh, excluded = expert_mesh(device_mesh), excluding(exclude_key_regex)
        if lookup(fqn, Layout.NEMO) is None and excluded(fqn, fqn):
            return []
        entry = entries.explain(fqn, tensor, self._inventory(Layout.NEMO), mesh)
        _agree([entry], mesh, excluded, STAGING_BYTES)
        return list(IntoHf(conversion_of(self.backend), mesh, excluded).as_gathered(entry))

    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """Return the hf names that `to_hf` gives for this state dict, in its order, without touching a value."""
        inventory = self._inventory(Layout.NEMO)
        keys: list[str] = []
        for name, value in state_dict.items() if isinstance(state_dict, Mapping) else state_dict:
            dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None
            keys += hf_names(inventory.add(name, None, dtype), name)
        return keys

    def _gather_expert_tensor(
        self, tensor: torch.Tensor, device_mesh: DeviceMesh | None, n_experts: int
    ) -> torch.Tensor:
        """Return a native expert tensor [n_experts, ...] whole on every rank.

        Args:
            tensor: A DTensor, a rank's plain part of `device_mesh`, or the whole tensor.
            device_mesh: The mesh of a plain part.
            n_experts: E.

        Raises:
            TensorShapeError: The whole tensor does not have `n_experts` rows.
            ParallelError: See `to_hf`.
        """
        mesh = expert_mesh(device_mesh)
        if mesh is not None and not isinstance(tensor, DTensor):
            shape = self._whole_native_shape(tuple(tensor.shape), mesh, n_experts)
            if shape != tuple(tensor.shape):
                tensor = placed_on(mesh, "experts").wrap(tensor, shape)
        if tensor.shape[0] != n_experts:
            raise TensorShapeError(
                "an expert tensor of the wrong number of experts",
                expected=f"{n_experts} experts",
                found=list(tensor.shape),
                hint="give the mesh over which the experts are sharded",
            )
        if not isinstance(tensor, DTensor):
            return tensor
        where = placed(tensor, "experts")
        agree(where.mesh, ["gather", list(tensor.shape), str(where.placements), str(tensor.dtype)])
        return collectives.gather(local_of(tensor), where, tensor.shape)

    def _whole_native_shape(self, shape: tuple[int, ...], mesh: DeviceMesh, n_experts: int) -> tuple[int, ...]:
        """Return the shape of the native tensor, gate_and_up or down, that a plain tensor is or is a part of."""
        where = placed_on(mesh, "experts")
        sizes = axis_sizes(self.config, self.moe_config) | {"E": n_experts}
        whole = {whole_shape(shape, rule.nemo_axes, sizes, where, "experts") for rule in (GATE_UP, DOWN)}
        parts = whole - {shape}
        return parts.pop() if len(parts) == 1 else shape

    def _inventory(self, layout: Layout) -> Inventory:
        return Inventory(layout, axis_sizes(self.config, self.moe_config))


def _agree(
    found: Iterable[Entry], mesh: DeviceMesh | None, excluded: Callable[[str, str], bool], staging_bytes: int
) -> None:
    """Let the ranks of every mesh on which a DTensor or a part lies agree on all that decides which collectives run.

    That is the hf names that are wanted, and shape, placements and dtype of the native tensor, in order; and the
    staging, which decides how many blocks there are.
    """
    plans: dict[DeviceMesh, list[Any]] = {}
    for entry in found:
        value = entry.value
        wanted = [hf for hf in hf_names(entry.parsed, entry.name) if not excluded(hf, entry.name)]
        if isinstance(value, DTensor) and not value.is_meta:
            line = [entry.name, wanted, list(entry.shape), str(value.placements), str(value.dtype)]
            plans.setdefault(value.device_mesh, [staging_bytes]).append(line)
        elif mesh is not None and isinstance(value, torch.Tensor) and tuple(value.shape) != entry.shape:
            line = [entry.name, wanted, list(entry.shape), "a part", str(value.dtype)]
            plans.setdefault(mesh, [staging_bytes]).append(line)
    for own, plan in plans.items():
        agree(own, plan)


def _refuse_quantization(quantization: bool) -> None:
    if quantization:
        raise UsageError(
            "quantised hf output is not supported",
            expected="quantization=False",
            found="quantization=True",
            hint="convert without it, then quantise the hf checkpoint with the tool of your engine",
        )
