"""LoRA parameters in a stream's state: merged into each weight as it is sent, or given in the form of an engine."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gemma4_moe.distributed.placements import local_of, placed, take
from gemma4_moe.errors import InputError, TensorShapeError, UnknownTensorError, UsageError
from gemma4_moe.layout.lora import ADAPTER_PREFIX, LINEAR, LORA_REGEX, is_lora
from gemma4_moe.layout.names import fold_names
from gemma4_moe.layout.table import Operation
from gemma4_moe.lora.names import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gemma4_moe.lora.names import LoraName
    from gemma4_moe.refit.items import Item, TensorFacts

    #: Returns a tensor of the state by its facts.
    Read = Callable[[TensorFacts], torch.Tensor]

Lora = Literal["merged", "separate"]

#: The most elements of a sum that is held in fp32.
_PIECE = 2**24


class Pair(NamedTuple):
    """The adapter of one weight, with the names' meanings."""

    a: TensorFacts
    b: TensorFacts
    meanings: tuple[LoraName, LoraName]

    @property
    def rank(self) -> int:
        """The rank r: experts have A [E, in, r], linear modules A [r, in]."""
        return self.a.shape[-1] if self.meanings[0].row is not None else self.a.shape[0]


def lora_apart(
    natives: list[TensorFacts], lora: Lora | None, alpha: float | None
) -> tuple[list[TensorFacts], dict[str, Pair]]:
    """Return a state's tensors without its adapter, and the adapter by the names of the weights.

    Raises:
        InputError: There is an adapter, and no word for it; or it is not in NeMo's names, or does not fit the weights.
        UsageError: `lora` has no meaning, or no alpha is given.
    """
    if lora not in (None, "merged", "separate"):
        raise UsageError("no such value of lora", expected="merged or separate", found=repr(lora))
    if lora is None:
        _refuse_unmerged(natives)
        return natives, {}
    if alpha is None:
        hint = "give lora_alpha, as adapter_config.json or the recipe has it"
        raise UsageError("an adapter without its scaling", expected="lora_alpha", found="None", hint=hint)
    weights = {facts.name: facts for facts in natives if not is_lora(facts.name)}
    sides: defaultdict[str, dict[str, tuple[TensorFacts, LoraName]]] = defaultdict(dict)
    for facts in natives:
        if facts.name not in weights:
            meaning = explain(facts.name)
            sides[_weight_of(facts.name, meaning)][meaning.side] = facts, meaning
    pairs = {}
    for name, pair in sides.items():
        first = next(iter(pair.values()))[0]
        if pair.keys() != {*"AB"} or name not in weights:
            hint = "give the whole state of one model in NeMo's names; or merge the adapter first"
            found = "no such weight" if name not in weights else f"{', '.join(pair)} alone"
            raise UnknownTensorError(
                "an adapter without its weight or its other matrix",
                tensor=first.name,
                expected=f"{name}, and A and B",
                found=found,
                hint=hint,
            )
        pairs[name] = Pair(pair["A"][0], pair["B"][0], (pair["A"][1], pair["B"][1]))
        _check(weights[name], pairs[name])
    return list(weights.values()), pairs


def _refuse_unmerged(natives: Iterable[TensorFacts]) -> None:
    """Check that no adapter is left beside the weights: an engine would load the weights without it."""
    unmerged = [facts.name for facts in natives if is_lora(facts.name)]
    if unmerged:
        raise InputError(
            "an adapter that is not merged into the weights",
            tensor=unmerged[0],
            expected='merged weights, or lora="merged" or lora="separate"',
            found=f"{len(unmerged)} tensors: {', '.join(fold_names(unmerged))}",
            hint='give lora="merged" and lora_alpha; or lora="separate", lora_alpha, and send lora_tensors() too; or '
            "if the adapter was merged, or the engine gets it by another way, leave it out by "
            f"exclude_key_regex={LORA_REGEX!r}, and unwrap names with base_layer in them",
        )


def _weight_of(name: str, meaning: LoraName) -> str:
    if meaning.row is not None:
        return meaning.path + meaning.row.rule.nemo
    if not meaning.module:
        hint = "merge the adapter first with the library that trains it (PEFT: merge_adapter)"
        raise UnknownTensorError("an adapter of experts in another form than NeMo's", tensor=name, hint=hint)
    return name.removesuffix(LINEAR[meaning.side]) + "weight"


def _check(weight: TensorFacts, pair: Pair) -> None:
    (a, b), rank = (pair.a.shape, pair.b.shape), pair.rank
    if pair.meanings[0].row is not None:
        expected = (*a[:-1], b[-1])
        fits = len(a) == len(b) == 3 and b[:2] == (a[0], rank)
    else:
        expected = (b[0], a[-1])
        fits = len(a) == len(b) == 2 and b[1] == rank
    if not fits or weight.shape != expected:
        hint = "give the state of one model"
        raise TensorShapeError(
            "an adapter that does not fit its weight",
            tensor=pair.b.name,
            expected=weight.shape,
            found=f"A {list(a)}, B {list(b)}",
            hint=hint,
        )
    for side in (pair.a, pair.b):
        if side.mapping != weight.mapping or (side.mesh is not None and weight.mesh is None):
            raise UsageError(
                "an adapter that is not beside its weight",
                tensor=side.name,
                expected=f"one mapping of the state, and one mesh, as {weight.name} has",
                found=f"mapping {side.mapping}, mesh {side.mesh}",
                hint="put a weight and its adapter into one mapping, and shard them together",
            )


class Merger:
    """Adds the adapter to weights of one pass. It holds one merged tensor at a time."""

    def __init__(self, pairs: Mapping[str, Pair], alpha: float | None, read: Read) -> None:
        self._pairs, self._alpha, self._read = pairs, alpha, read
        self._last: tuple[tuple[str, torch.dtype], torch.Tensor] | None = None

    def merged(self, item: Item, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor of an item with its change, in the item's dtype; the sum is fp32 and rounded once.

        Sharded as `value` is. All ranks of its mesh must call.
        """
        pair = None if item.operation is Operation.FOLD else self._pairs.get(item.origin.name)
        if pair is None:
            return value
        assert self._alpha is not None, "an adapter has an alpha"
        key = item.origin.name, getattr(torch, item.dtype.name)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next is made
            self._last = key, _merged(value, pair, self._alpha / pair.rank, self._read, key)
        return self._last[1]


def _merged(value: torch.Tensor, pair: Pair, factor: float, read: Read, key: tuple[str, torch.dtype]) -> torch.Tensor:
    a, b = (_whole(read(side)).float() for side in (pair.a, pair.b))
    left, right = (b, a) if a.ndim == 2 else (a, b)  # native experts are [E, in, out], linear weights [out, in]
    local, where = local_of(value), placed(value, key[0]) if isinstance(value, DTensor) else None
    if where is not None:
        *outer, rows, columns = where.runs(value.shape)
        rank = (range(pair.rank),)
        left, right = take(left, (*outer, rows, rank)), take(right, (*outer, rank, columns))
    out = torch.empty(local.shape, dtype=key[1], device=local.device)
    step = max(1, _PIECE // max(1, local[:1].numel()))
    for first in range(0, len(local), step):
        own = slice(first, first + step)
        with_change = torch.addmm if local.ndim == 2 else torch.baddbmm
        other = right if local.ndim == 2 else right[own]
        out[own] = with_change(local[own].float(), left[own], other, alpha=factor)
    return out if where is None else where.wrap(out, value.shape)


def adapter_tensors(pairs: Mapping[str, Pair], read: Read) -> list[tuple[str, torch.Tensor]]:
    """Return an adapter's tensors in vLLM's form, in the order of the state's mappings."""
    largest = max((pair.rank for pair in pairs.values()), default=1)
    return [
        (ADAPTER_PREFIX + name, tensor.contiguous())
        for pair in sorted(pairs.values(), key=lambda pair: pair.a.mapping)
        for side, meaning in zip((pair.a, pair.b), pair.meanings, strict=True)
        for name, tensor in _in_form(_ratio(_whole(read(side)), largest / pair.rank, meaning), meaning)
    ]


def _ratio(tensor: torch.Tensor, ratio: float, meaning: LoraName) -> torch.Tensor:
    return tensor if meaning.side == "A" or ratio == 1 else (tensor.float() * ratio).to(tensor.dtype)


def _in_form(tensor: torch.Tensor, meaning: LoraName) -> Iterator[tuple[str, torch.Tensor]]:
    row = meaning.row
    if row is None:
        yield f"{meaning.path}{meaning.module}.{LINEAR[meaning.side]}", tensor
        return
    axes = [axis for (axis,) in row.nemo_axes]
    plain = tensor.permute([axes.index(axis) for axis in row.axes])
    parts = plain.chunk(len(row.projections), dim=1) if row.side == "B" else [plain] * len(row.projections)
    for expert in range(len(plain)):
        for projection, part in zip(row.projections, parts, strict=True):
            yield meaning.path + row.vllm(expert, projection), part[expert]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
