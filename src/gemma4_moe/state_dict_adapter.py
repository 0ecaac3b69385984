"""The state-dict adapter between the two layouts, in memory: whole dicts, and tensor by tensor.

    hf name                                  axes         nemo name                               axes
    P layers.L.experts.gate_up_proj          [E, 2I, H]   P layers.L.moe.experts.gate_and_up_projs [E, H, 2I]
    P layers.L.experts.down_proj             [E, H, I]    P layers.L.moe.experts.down_projs        [E, I, H]
    P layers.L.router.per_expert_scale       [E]          (folded into down_projs)

The table itself is in `layouts`; what an operation does to shapes in `transforms`; the arithmetic in `kernels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gemma4_moe import destinations, entries
from gemma4_moe.configs import axis_sizes, conversion_of
from gemma4_moe.errors import IncompleteExpertsError, TensorShapeError, UsageError
from gemma4_moe.interface import StateDict, StateDictAdapter
from gemma4_moe.inventory import Inventory, Owner
from gemma4_moe.kernels import scale_in_place, transpose_scale_cast
from gemma4_moe.layouts import DOWN, GATE_UP, SCALE, Layout, MoEName, Operation, Rule, lookup, parse
from gemma4_moe.transforms import converted_shape

#: Says whether an entry is left out, by its hf name and its nemo name.
Excluded = Callable[[str, str], bool]


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

    def from_hf(
        self,
        hf_state_dict: StateDict,
        device_mesh: Any = None,
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
            device_mesh: The mesh over which plain tensors are sharded.
            out: Native tensors to write into, by nemo name, instead of making new ones. Their dtype decides.
            **kwargs: What a framework hands to every adapter; without effect here.

        Raises:
            IncompleteExpertsError: A layer lacks gate_up_proj, down_proj or per_expert_scale.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
        """
        del kwargs
        _refuse_mesh(device_mesh)
        result: dict[str, Any] = {}
        waiting: dict[Owner, dict[Rule, Any]] = {}
        for parsed, name, value in entries.explained(hf_state_dict, self._inventory(Layout.HF)):
            if parsed is None or parsed.rule.operation is Operation.KEEP:
                native = name if parsed is None else parsed.nemo
                result[native] = _kept(native, value, out)
            elif parsed.rule is GATE_UP:
                result[parsed.nemo] = self._native(parsed, value, None, out)
            else:
                pair = waiting.setdefault(parsed.owner, {})
                pair[parsed.rule] = value
                if len(pair) == 2:
                    result[parsed.nemo] = self._native(parsed.sibling(DOWN), pair.pop(DOWN), pair.pop(SCALE), out)
            del value  # or it would stay alive while the next one is made
        return result

    def to_hf(
        self,
        state_dict: StateDict,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        device_mesh: Any = None,
        for_checkpoint_load: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the state dict in the hf layout, `per_expert_scale` as ones.

        Args:
            state_dict: A mapping or an iterable of (name, tensor) in the nemo layout.
            exclude_key_regex: Leave out what this matches (`re.match`) by its hf name or by its nemo name; the nemo
                name of the scale is that of `down_projs`.
            quantization: Must be False: quantised output is not supported.
            device_mesh: The mesh of plain local shards.
            for_checkpoint_load: Return destinations instead of copies: transposed views of the given tensors'
                storage for a checkpoint reader to fill, and an fp32 scale full of NaN, both for `from_hf` to finish.
            **kwargs: What a framework hands to every adapter; without effect here.

        Returns:
            hf names and tensors in the order of the input: contiguous expert tensors of the input's dtype on its
            device; all other tensors are the same objects.

        Raises:
            IncompleteExpertsError: A layer has only one of its two expert tensors.
            UnknownTensorError, DuplicateTensorError, TensorShapeError: See `Inventory.add`.
            UsageError: `quantization` is asked for.
        """
        del kwargs
        _refuse_mesh(device_mesh)
        _refuse_quantization(quantization)
        excluded = _excluding(exclude_key_regex)
        convert = _destinations if for_checkpoint_load else _converted
        result: dict[str, Any] = {}
        inventory = self._inventory(Layout.NEMO)
        for parsed, name, value in entries.explained(state_dict, inventory, lambda name: excluded(name, name)):
            result.update(convert(parsed, name, value, excluded))
            del value  # or it would stay alive while the next one is made
        return result

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: Any,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **kwargs: Any,
    ) -> list[tuple[str, Any]]:
        """Return one native tensor as (hf name, tensor) pairs: two for `down_projs`, which carries the scale, else one.

        Arguments and errors are those of `to_hf`; a tensor on the meta device gives meta tensors.
        """
        del kwargs
        _refuse_quantization(quantization)
        excluded = _excluding(exclude_key_regex)
        if lookup(fqn, Layout.NEMO) is None and excluded(fqn, fqn):
            return []
        parsed = entries.explain(fqn, tensor, self._inventory(Layout.NEMO))
        return list(_converted(parsed, fqn, tensor, excluded))

    def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
        """Return the hf names that `to_hf` gives for this state dict, in its order, without touching a value."""
        names = state_dict if isinstance(state_dict, Mapping) else (name for name, _ in state_dict)
        return [hf for name in names for hf in hf_names(parse(name, Layout.NEMO), name)]

    def _inventory(self, layout: Layout) -> Inventory:
        return Inventory(layout, axis_sizes(self.config, self.moe_config))

    def _native(
        self, name: MoEName, value: Any, scale: Any | None, out: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """Make, fill or finish the native tensor of one row; `scale` is None for a row without one."""
        native = destinations.native_of(value)
        if native is not None:
            return native if scale is None else _folded_in_place(name, native, scale)
        factor = None if scale is None else entries.tensor(scale)
        tensor = entries.tensor(value)
        if out is None:
            return transpose_scale_cast(tensor, scale=factor, dtype=self.dtype)  # type: ignore[no-any-return]
        target = _out(out, name.nemo, converted_shape(name.rule.operation, tuple(tensor.shape)))
        transpose_scale_cast(tensor, scale=factor, dtype=target.dtype, out=target.detach())
        return target


def hf_names(parsed: MoEName | None, name: str) -> Iterator[str]:
    """Yield the hf names that the native tensor `name` becomes; `parsed` is what the grammar says of it."""
    yield name if parsed is None else parsed.hf
    if parsed is not None and parsed.rule is DOWN:
        yield parsed.sibling(SCALE).hf


def _kept(native: str, value: Any, out: Mapping[str, torch.Tensor] | None) -> Any:
    """Return a value that is the same in both layouts: the same object, or copied to its place in `out`."""
    kept = entries.kept(value)
    if out is None or not isinstance(kept, torch.Tensor):
        return kept
    target = _out(out, native, tuple(kept.shape))
    target.detach().copy_(kept)
    return target


def _out(out: Mapping[str, torch.Tensor], native: str, shape: tuple[int, ...]) -> torch.Tensor:
    if native not in out:
        raise UsageError(
            "no tensor to write into",
            tensor=native,
            expected="its nemo name in `out`",
            hint="give `out` every tensor of the state dict",
        )
    if out[native].shape != shape:
        raise TensorShapeError(
            "the tensor to write into has another shape",
            tensor=native,
            expected=list(shape),
            found=list(out[native].shape),
            hint="give `out` the tensors of the same model",
        )
    return out[native]


def _folded_in_place(name: MoEName, native: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply a loaded `down_projs` by its loaded scale, and leave ones there: a second time changes nothing."""
    if bool(torch.isnan(scale).any()):
        raise IncompleteExpertsError(
            "Incomplete expert weights: a destination was not loaded",
            tensor=name.sibling(SCALE).hf,
            expected="a scale for each expert",
            found=f"NaN for {int(torch.isnan(scale).sum())} of {scale.numel()} experts",
            hint="load the checkpoint into all destinations before from_hf, and check that it holds the scale",
        )
    scale_in_place(native.detach(), scale)
    scale.fill_(1)
    return native


def _converted(parsed: MoEName | None, name: str, value: Any, excluded: Excluded) -> Iterator[tuple[str, Any]]:
    wanted = [hf for hf in hf_names(parsed, name) if not excluded(hf, name)]
    if parsed is None or parsed.rule.operation is Operation.KEEP:
        yield from ((hf, entries.kept(value)) for hf in wanted)
    elif wanted:
        native = entries.tensor(value)
        for hf in wanted:
            if hf == parsed.hf:
                yield hf, transpose_scale_cast(native)
            else:
                yield hf, torch.ones(native.shape[:1], dtype=native.dtype, device=native.device)


def _destinations(
    parsed: MoEName | None, name: str, value: torch.Tensor, excluded: Excluded
) -> Iterator[tuple[str, torch.Tensor]]:
    for hf in hf_names(parsed, name):
        if excluded(hf, name):
            continue
        if parsed is None or parsed.rule.operation is Operation.KEEP:
            yield hf, value
        elif hf == parsed.hf:
            yield hf, destinations.mark(value.detach().transpose(-1, -2), value)
        else:
            yield hf, destinations.unfilled_scale(value)


def _excluding(regex: str | None) -> Excluded:
    if regex is None:
        return lambda _hf, _nemo: False
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError("exclude_key_regex is not a regular expression", found=regex, hint=str(error)) from error
    return lambda hf, nemo: pattern.match(hf) is not None or pattern.match(nemo) is not None


def _refuse_quantization(quantization: bool) -> None:
    if quantization:
        raise UsageError(
            "quantised hf output is not supported",
            expected="quantization=False",
            found="quantization=True",
            hint="convert without it, then quantise the hf checkpoint with the tool of your engine",
        )


def _refuse_mesh(device_mesh: Any) -> None:
    if device_mesh is not None and device_mesh.size() > 1:
        raise UsageError(
            "sharding over several ranks is not supported",
            expected="device_mesh=None, or a mesh of one rank",
            found=f"a mesh of {device_mesh.size()} ranks",
        )
