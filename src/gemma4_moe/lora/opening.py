"""An adapter's directory, opened: its documents, its form, and its modules as plain tensors."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.hashing import Extent, blake3_of, hash_extents
from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.checkpoint.stored import StoredTensor
from gemma4_moe.errors import CheckpointFormatError, IncompleteExpertsError, TensorShapeError
from gemma4_moe.layout.dtypes import EXPERT_DTYPES
from gemma4_moe.layout.lora import LORA_ROWS, LoraForm, ParamWrapper
from gemma4_moe.layout.names import layer_of, natural_key
from gemma4_moe.layout.table import DOWN, GATE_UP
from gemma4_moe.lora.config import CONFIG_NAME, LONGEST, NATIVE_NAME, WEIGHTS_NAME, read_lora_config
from gemma4_moe.lora.modules import LoraModule, LoraTensor, plain_from
from gemma4_moe.lora.names import explain, form_of
from gemma4_moe.lora.stored import experts_of_vllm, layout_in_use, wrapped_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gemma4_moe.layout.lora import Axes, LoraRow
    from gemma4_moe.layout.names import LayerKey
    from gemma4_moe.lora.config import LoraConfig
    from gemma4_moe.lora.names import LoraName

#: Bytes of buffers with which the weights are hashed.
_HASH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Adapter:
    """An open adapter.

    Attributes:
        modules: Its modules by name in the hf layout, in natural order.
        layout: The layout of PEFT's wrapper, for PEFT's form with experts.
        experts: The number of experts, or None if it adapts none.
    """

    path: Path
    file: SafetensorsFile
    config: LoraConfig
    form: LoraForm
    modules: Mapping[str, LoraModule]
    layout: ParamWrapper | None
    experts: int | None

    @property
    def needs_scale(self) -> bool:
        """Whether it changes a weight that a folded and an unfolded base do not share."""
        return any(module.rule is DOWN for module in self.modules.values())

    def hashes(self) -> dict[str, str]:
        """Return the BLAKE3 of the weights, and that of each document."""
        paths = (self.path / CONFIG_NAME, self.path / NATIVE_NAME)
        found = {path.name: blake3_of([read_whole(path, LONGEST)]) for path in paths if path.exists()}
        (weights,) = hash_extents([[Extent(self.file, 0, self.file.size)]], _HASH_BYTES, buffered=True)
        return {WEIGHTS_NAME: weights} | found

    def scaling_of(self, module: LoraModule) -> float:
        """Return the factor of B · A of a module."""
        return self.config.scaling(module.rank, module.alpha)


@contextmanager
def open_adapter(path: Path) -> Iterator[Adapter]:
    """Open an adapter's directory, and check names, shapes and documents without reading a value.

    Raises:
        CheckpointFormatError: A file is missing or breaks the rules of safetensors.
        ConfigError, UnsupportedCheckpointError: See `read_lora_config` and `explain`.
        UnknownTensorError: A name that no form has, or names of two forms.
        TensorShapeError: Shapes that contradict each other or the documents.
        IncompleteExpertsError: A module lacks its A or its B, or an expert's.
    """
    _require_weights(path)
    config = read_lora_config(path)
    with SafetensorsFile(path / WEIGHTS_NAME) as file:
        stored = stored_in(file)
        for tensor in stored.values():
            _require_float(tensor)
        names = {name: explain(name) for name in stored}
        form = form_of(names, has_native_document=config.native is not None)
        layout = layout_in_use(stored, names, config) if form is LoraForm.PEFT else None
        linear = {name: meaning for name, meaning in names.items() if meaning.module}
        experts = {name: meaning for name, meaning in names.items() if not meaning.module}
        modules = {**_linear(stored, linear, config, form), **_experts(stored, experts, config, form, layout)}
        counts = {module.sides["A"].shape[0]: module.name for module in modules.values() if module.is_experts}
        if len(counts) > 1:
            (count, first), (other, second) = list(counts.items())[:2]
            raise _wrong(second, file.path, f"{count} experts, as {first} has", f"{other} experts")
        ordered = dict(sorted(modules.items(), key=lambda item: natural_key(item[0])))
        yield Adapter(path, file, config, form, ordered, layout, next(iter(counts), None))


def stored_in(file: SafetensorsFile) -> dict[str, StoredTensor]:
    """Return the tensors of an open file by their names."""
    return {
        entry.name: StoredTensor(entry.name, entry.dtype, entry.shape, entry.start, entry.end, file)
        for entry in file.header.entries
    }


def _require_weights(path: Path) -> None:
    with refusals("look at the directory", path):
        there = (path / WEIGHTS_NAME).exists()
        below = (path / "model" / WEIGHTS_NAME).exists()
        pickled = (path / "adapter_model.bin").exists()
    if there:
        return
    hint = "name the directory that a trainer has saved the adapter in"
    if below:
        hint = f"name its subdirectory: {path / 'model'}"
    elif pickled:
        hint = "unpickling runs code: save the adapter again with safe_serialization"
    raise CheckpointFormatError("no adapter in this directory", file=path, expected=WEIGHTS_NAME, hint=hint)


def _require_float(tensor: StoredTensor) -> None:
    if tensor.dtype not in EXPERT_DTYPES:
        expected = ", ".join(dtype.name for dtype in EXPERT_DTYPES)
        raise _wrong(tensor.name, tensor.file.path, f"one of {expected}", tensor.dtype.name)


def _wrong(tensor: str, file: object, expected: object, found: object) -> TensorShapeError:
    problem = "a tensor of an adapter that does not fit the others, or its documents"
    hint = "save the adapter again with the program that trained it"
    return TensorShapeError(problem, tensor=tensor, file=file, expected=expected, found=found, hint=hint)


def _linear(
    stored: Mapping[str, StoredTensor], names: Mapping[str, LoraName], config: LoraConfig, form: LoraForm
) -> dict[str, LoraModule]:
    """Return the modules of linear layers: A [r, in] and B [out, r]."""
    sides: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, meaning in names.items():
        module = meaning.path + meaning.module
        if meaning.side in sides[module]:
            raise _wrong(name, stored[name].file.path, "each tensor under one name", sides[module][meaning.side].name)
        sides[module][meaning.side] = stored[name]
    found = {}
    for module, pair in sides.items():
        _require_both(module, pair)
        rank = pair["A"].shape[0] if len(pair["A"].shape) == 2 else -1
        for side, axis in (("A", 0), ("B", 1)):
            shape = pair[side].shape
            if len(shape) != 2 or shape[axis] != rank or not rank:
                raise _wrong(
                    pair[side].name, pair[side].file.path, f"two axes, rank {rank} on axis {axis}", list(shape)
                )
        tensors = {side: LoraTensor(t.name, t.dtype, t.shape, t.read) for side, t in pair.items()}
        found[module] = LoraModule(
            module, rank, _alpha(module, rank, pair["A"], config, form), tensors, layer_of(module)
        )
    return found


def _experts(
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, LoraName],
    config: LoraConfig,
    form: LoraForm,
    layout: ParamWrapper | None,
) -> dict[str, LoraModule]:
    """Return the modules of experts."""
    by_layer: defaultdict[str, dict[str, LoraName]] = defaultdict(dict)
    for name, meaning in names.items():
        by_layer[meaning.path][name] = meaning
    found: dict[str, LoraModule] = {}
    for path, own in by_layer.items():
        key = layer_of(f"{path}x")
        assert key is not None, "experts are in a layer"
        if form is LoraForm.NEMO:
            rows = {
                meaning.row: _single(stored[name], meaning.row.nemo_axes, meaning.row, {})
                for name, meaning in own.items()
                if meaning.row
            }
        elif form is LoraForm.PEFT:
            assert layout is not None, "PEFT's form has a layout"
            rows = {}
            for name, row in wrapped_rows(path, own, config, layout).items():
                rank = config.rank_of(path + row.rule.hf)
                rows[row] = _single(stored[name], row.axes_in_peft(layout), row, {"r": rank})
        else:
            rows = experts_of_vllm(path, {name: stored[name] for name in own}, own)
        found |= _modules(path, key, rows, config, form)
    return found


def _single(tensor: StoredTensor, axes: Axes, row: LoraRow, known: Mapping[str, int]) -> LoraTensor:
    """Return one stored tensor as a plain one; `known` has the sizes that its shape alone does not tell."""
    if len(tensor.shape) != len(axes):
        raise _wrong(tensor.name, tensor.file.path, f"{len(axes)} axes", list(tensor.shape))
    sizes = dict(known)
    for group, size in zip(axes, tensor.shape, strict=True):
        (unknown,) = [axis for axis in group if axis not in known]
        inner = int(np.prod([known[axis] for axis in group if axis in known]))
        if not size or size % inner:
            raise _wrong(tensor.name, tensor.file.path, f"a multiple of the rank {inner}, for all experts", size)
        sizes[unknown] = size // inner
    plain = tuple(sizes[axis] for axis in row.axes)
    return LoraTensor(tensor.name, tensor.dtype, plain, lambda: plain_from(tensor.read(), axes, row.axes, sizes))


def _modules(
    path: str, key: LayerKey, rows: Mapping[LoraRow, LoraTensor], config: LoraConfig, form: LoraForm
) -> dict[str, LoraModule]:
    """Return the modules of one layer's experts, their sizes compared."""
    sizes: dict[str, tuple[float, str]] = {}
    found = {}
    for rule in (GATE_UP, DOWN):
        pair = {row.side: rows[row] for row in LORA_ROWS if row.rule is rule and row in rows}
        if not pair:
            continue
        name = path + rule.hf
        _require_both(name, pair)
        local: dict[str, tuple[float, str]] = {}
        for row in LORA_ROWS:
            if row.rule is rule:
                tensor = rows[row]
                for axis, size in zip(row.axes, tensor.shape, strict=True):
                    letter, value = ("I", size / 2) if axis == "2I" else (axis, size)
                    known = (local if letter == "r" else sizes).setdefault(letter, (value, tensor.name))
                    if known[0] != value:
                        raise _wrong(
                            tensor.name, config.path.parent, f"{letter} = {known[0]}, as {known[1]} has", value
                        )
        rank = pair["A"].shape[1]
        alpha = _alpha(name, rank, pair["A"], config, form)
        found[name] = LoraModule(name, rank, alpha, pair, key, rule)
    return found


def _alpha(module: str, rank: int, first: StoredTensor | LoraTensor, config: LoraConfig, form: LoraForm) -> float:
    """Return the alpha that gives a module's scaling with its own rank."""
    if form is LoraForm.VLLM and rank == config.rank:
        return config.alpha
    if form is LoraForm.VLLM:  # it takes one scaling for all, whatever a matrix's own rank
        own = config.scaling(config.rank, config.alpha)
        return own * (rank**0.5 if config.is_rslora else rank)
    said = config.rank_of(module)
    if form is LoraForm.PEFT and said != rank:
        raise _wrong(first.name, config.path, f"rank {said}, as {config.path.name} says", f"rank {rank}")
    return config.alpha_of(module)


def _require_both(module: str, pair: Mapping[str, StoredTensor | LoraTensor]) -> None:
    for side in "AB":
        if side not in pair:
            raise IncompleteExpertsError(
                f"an adapter's module lacks its {side}",
                tensor=f"{module}.lora_{side}",
                expected="A and B",
                found=next(iter(pair.values())).name,
                hint="get the adapter's directory again, or save it again",
            )
