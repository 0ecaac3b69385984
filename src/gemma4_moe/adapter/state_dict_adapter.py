"""`Gemma4MoEStateDictAdapter`: state dicts between the two layouts, whole or tensor by tensor.

    hf name                                  axes         nemo name                               axes
    P layers.L.experts.gate_up_proj          [E, 2I, H]   P layers.L.moe.experts.gate_and_up_projs [E, H, 2I]
    P layers.L.experts.down_proj             [E, H, I]    P layers.L.moe.experts.down_projs        [E, I, H]
    P layers.L.router.per_expert_scale       [E]          (folded into down_projs)

The whole table is `layout.table`. A state dict goes through `entries`, which checks names, shapes and dtypes, and then
through `from_hf` or `to_hf`, which convert; `destinations` are for a reader that loads into the model's own storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.adapter import entries
from gemma4_moe.adapter.configs import axis_sizes, conversion_of, decoder_layers
from gemma4_moe.adapter.from_hf import FromHf
from gemma4_moe.adapter.interface import StateDict, StateDictAdapter
from gemma4_moe.adapter.to_hf import Form, ToHf, excluding
from gemma4_moe.distributed.collectives import agree
from gemma4_moe.distributed.gathering import STAGING_BYTES, gather
from gemma4_moe.distributed.placements import expert_mesh, local_of, placed, placed_on, whole_shape
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.inventory import Inventory
from gemma4_moe.layout.names import PUBLISHED_PREFIXES, MoEName, lookup
from gemma4_moe.layout.spellings import LEGACY_NAMES
from gemma4_moe.layout.table import DOWN, GATE_UP, Layout
from gemma4_moe.layout.targets import hf_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Gemma4MoEStateDictAdapter(StateDictAdapter):
    """Convert Gemma 4 mixture-of-experts state dicts between the `hf` and the `nemo` layout.

    An adapter has no state beyond its arguments: each call's result depends on the call's arguments alone. No input is
    modified unless it was given as `out` or as a destination.

    Args:
        config: The text config, or a multimodal config that has it as `text_config`, as an object or a dict: gives E,
            H and I. A field that is no integer counts as absent.
        moe_config: Any object with `n_routed_experts`, E. Sizes that neither config gives are learned from the tensors.
        backend: Any object; its attribute `conversion`, if any, names the kernel.
        dtype: Dtype of the native expert tensors that `from_hf` makes, or its name: float32, bfloat16 or float16.

    Raises:
        ConfigError: The configs disagree, or give a size less than one.
        UsageError: A dtype that experts can't have, or an unknown kernel.
    """

    _supports_low_memory_dcp_load = True

    def __init__(
        self, config: Any = None, moe_config: Any = None, backend: Any = None, dtype: torch.dtype | str = torch.float32
    ) -> None:
        self.config = config
        self.moe_config = moe_config
        self.backend = backend
        self.dtype = _expert_dtype(dtype)
        axis_sizes(config, moe_config)
        conversion_of(backend)

    @property
    def checkpoint_key_aliases(self) -> dict[str, str]:
        """The names of the first published files, by the current hf name: a reader tries them where it is missing.

        They need the number of layers in the config; without it there are none.
        """
        layers = decoder_layers(self.config)
        keys = [(prefix, layer) for prefix in PUBLISHED_PREFIXES for layer in range(layers)]
        return {
            MoEName(*key, rule).hf: MoEName(*key, rule).layer_path + old for key in keys for rule, old in LEGACY_NAMES
        }

    def map_peft_target_module_to_hf(self, name: str, *, v4_compatible: bool = False) -> str:
        """Return the hf name of a module: that of the router's projection differs."""
        del v4_compatible
        found = lookup(f"{name}.weight", Layout.NEMO)
        return name if found is None else found.hf.removesuffix(".weight")

    def from_hf(
        self,
        hf_state_dict: StateDict,
        device_mesh: DeviceMesh | None = None,
        *,
        out: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the state dict in the nemo layout.

        Expert tensors become new tensors of the adapter's dtype: `gate_and_up_projs` [E, H, 2I], and `down_projs`
        [E, I, H] = down_proj transposed × per_expert_scale, the product in fp32, rounded once. All other values are
        returned as the same objects. Destinations made by `to_hf(for_checkpoint_load=True)` are finished in place.

        Args:
            hf_state_dict: A mapping, or an iterable of (name, tensor) that is consumed tensor by tensor. A value may
                be lazy, as safetensors' slices are: any object with `get_shape`, `get_dtype` and `__getitem__`.
            device_mesh: The mesh over which plain tensors are to be sharded, or of which they are this rank's shards;
                the results are DTensors. A DTensor's own mesh takes precedence.
            out: Native tensors to write into, by nemo name, instead of new ones. Their dtypes decide, and the
                placements of those that are DTensors.
            **kwargs: Arguments that a framework passes to every adapter; ignored.

        Raises:
            IncompleteExpertsError: A layer lacks gate_up_proj, down_proj or per_expert_scale; or a destination was
                not loaded.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
            ParallelError: A mesh or a placement is not known, or tensors of one layer have different placements.
            UsageError: `out` lacks a tensor or is given with destinations; or a layer mixes those with other tensors.
        """
        del kwargs
        mesh = expert_mesh(device_mesh)
        inventory = self._inventory(Layout.HF)
        found = entries.checked(hf_state_dict, inventory, mesh)
        return dict(FromHf(conversion_of(self.backend), self.dtype, mesh, out).convert(found, inventory))

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
            exclude_key_regex: Leave out each entry whose hf or nemo name this matches (`re.match`), unchecked; the nemo
                name of the scale is that of `down_projs`.
            quantization: Whether the model's config names a quantisation method. Destinations are the same with it;
                other results can't be quantised.
            device_mesh: The mesh of plain local shards. A DTensor's own mesh takes precedence.
            for_checkpoint_load: Return destinations for a checkpoint reader to fill and `from_hf` to finish: transposed
                views of the given tensors' storage, and an fp32 scale of NaN. `from_hf` refuses a layer whose scale is
                still NaN. A view that the reader skips keeps the model's values, and only the reader can report it.
            gather: Return whole tensors on every rank. All ranks of the tensors' meshes must call, and agree on the
                work first.
            staging_bytes: The most bytes of staging that a gather takes on a CPU.
            **kwargs: Arguments that a framework passes to every adapter; ignored.

        Returns:
            hf names and tensors in the order of the input. Whole expert tensors become new contiguous ones of the
            input's dtype, on its device. Without `gather`, DTensors and plain local shards become DTensors that view
            the same storage. All other values are returned as the same objects.

        Raises:
            IncompleteExpertsError: A layer has only one of its two expert tensors.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
            ParallelError: Ranks disagree, a collective failed, or a placement is not known.
            UsageError: `quantization` without `for_checkpoint_load`, or both `gather` and `for_checkpoint_load`.
        """
        del kwargs
        if gather and for_checkpoint_load:
            asked = "gather or for_checkpoint_load"
            raise UsageError("a destination can't be gathered", expected=asked, found="both", hint="leave one out")
        form: Form = "gathered" if gather else "destinations" if for_checkpoint_load else "sharded"
        how = self._conversion(form, quantization, device_mesh, exclude_key_regex, staging_bytes)
        inventory = self._inventory(Layout.NEMO, how.leaves_out)
        return dict(how.convert(entries.checked(state_dict, inventory, how.mesh)))

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
        """Return (hf name, whole tensor) pairs for one native tensor; `down_projs` also gives its scale.

        A DTensor, or a plain shard of `device_mesh`, is gathered: all ranks of its mesh must call. A tensor on the meta
        device gives meta tensors without communication. Arguments and errors are those of `to_hf`.
        """
        del kwargs
        how = self._conversion("gathered", quantization, device_mesh, exclude_key_regex, STAGING_BYTES)
        if how.leaves_out(fqn):
            return []
        return list(how.convert([entries.check(fqn, tensor, self._inventory(Layout.NEMO), how.mesh)]))

    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """Return the names that `to_hf` gives, in its order, without reading a value."""
        inventory = self._inventory(Layout.NEMO)
        pairs = state_dict.items() if isinstance(state_dict, Mapping) else state_dict
        parsed = ((name, inventory.add(name, None, entries.dtype_of(value))) for name, value in pairs)
        return [hf for name, found in parsed for hf, _ in hf_tensors(found, name)]

    def _gather_expert_tensor(
        self, tensor: torch.Tensor, device_mesh: DeviceMesh | None, n_experts: int
    ) -> torch.Tensor:
        """Return a native expert tensor [n_experts, ...] whole on every rank.

        It may be given as a DTensor, a plain shard of `device_mesh`, or whole.
        """
        mesh = expert_mesh(device_mesh)
        if mesh is not None and not isinstance(tensor, DTensor):
            where, sizes = placed_on(mesh, "experts"), axis_sizes(self.config, self.moe_config) | {"E": n_experts}
            own = tuple(tensor.shape)
            shapes = {whole_shape(own, rule.nemo_axes, sizes, where, "experts") for rule in (GATE_UP, DOWN)} - {own}
            if len(shapes) == 1:  # a shard of one of the two expert tensors
                tensor = where.wrap(tensor, shapes.pop())
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
        agree("gather", None, [(where.mesh, [list(tensor.shape), str(where.placements), str(tensor.dtype)])])
        return gather(local_of(tensor), where, tensor.shape)

    def _inventory(self, layout: Layout, leaves_out: Callable[[str], bool] = lambda _: False) -> Inventory:
        sizes = axis_sizes(self.config, self.moe_config)
        return Inventory(layout, sizes, any_router=True, leaves_out=leaves_out)

    def _conversion(
        self, form: Form, quantization: bool, mesh: DeviceMesh | None, exclude: str | None, staging_bytes: int
    ) -> ToHf:
        """Return the conversion to the hf layout that a call asks for."""
        if quantization and form != "destinations":
            raise UsageError(
                "quantised hf output is not supported",
                expected="quantization=False",
                found="quantization=True",
                hint="convert without it, then quantise the hf checkpoint with the tool of your engine",
            )
        return ToHf(conversion_of(self.backend), expert_mesh(mesh), excluding(exclude), form, staging_bytes)


def _expert_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of expert tensors that `dtype` is or names; another is a UsageError."""
    known = {name: getattr(torch, name) for name in (each.name for each in EXPERT_DTYPES)}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        hint = "give the dtype in which the model holds its experts"
        expected = ", ".join(f"torch.{each}" for each in known)
        raise UsageError("no dtype for expert tensors", expected=expected, found=repr(dtype), hint=hint)
    return cast("torch.dtype", known[name])
