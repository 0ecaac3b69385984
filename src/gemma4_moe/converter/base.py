"""The base of a conversion to hf: an hf checkpoint whose experts the model may still hold, folded.

The base's expert is folded again, and its bits are compared with the native ones, or with those to which an hf source
folds. An expert that is still the base's
gets the base's weights and scale. An expert that differs keeps its own bits, and its scale is one.

An expert is judged once, while its block is converted. The outcome is a fact of the block in the journal; the
scales [E] are written after all blocks, from the facts of all ranks and runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_moe import kernels
from gemma4_moe.checkpoint.config import CONFIG_NAME
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.checkpoint.recognition import checkpoint_targets, recognise
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Executor
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.readers import Readable, Reader
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.targets import Source, Target
    from gemma4_moe.target.pieces import Piece

    Array = np.ndarray[Any, np.dtype[Any]]
    FoldedScales = Mapping[str, Array]

#: The name of a model card.
CARD_NAME = "README.md"

_NAME_IT = "name the checkpoint that the model was made from, or leave --base out"

#: How many elements of an expert are looked at first: they tell most of those that can't be unfolded.
_FIRST = 2**12

#: How many elements are computed at once; a thread has up to 17 bytes for each.
_PIECE = 2**17


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """The experts of one layer of a base: its `down_proj` [E, H, I] and its `per_expert_scale` [E]."""

    weights: Source[StoredTensor]
    scale: StoredTensor

    def read_scale(self) -> Array:
        """Return the scale [E] in fp32."""
        return self.scale.read().astype(np.float32)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that these are."""
        return (*(part.stored for part in self.weights.parts), self.scale)


def find_base(base: Checkpoint, wanted: Mapping[str, Target[StoredTensor]]) -> dict[str, BaseExperts]:
    """Return the base's experts for each `down_proj` of the targets, by its name, after checking that they fit it."""
    config = base.read_config()
    layout = recognise(base.tensors, config).accepted()
    if layout is not Layout.HF:
        raise UsageError(
            "the base is in the wrong layout",
            file=base.path,
            expected=f"the {Layout.HF} layout",
            found=f"the {layout} layout",
            hint="name the published checkpoint that the model was made from",
        )
    targets = checkpoint_targets(base.tensors.values(), Layout.HF, config)
    found = {}
    for name, target in wanted.items():
        parsed = lookup(target.role, Layout.HF)
        if parsed is None or parsed.rule is not DOWN:
            continue
        native = targets.get(parsed.nemo)
        if native is None:
            raise UsageError("the base lacks a layer of the model", tensor=name, file=base.path, hint=_NAME_IT)
        assert native.source is not None, "a down_proj has a source"
        assert native.scale is not None, "a down_proj of the hf layout has a scale"
        found[name] = BaseExperts(native.source, native.scale)
        (scale,) = scales_with_base([name])
        _check(found[name], target, wanted[scale].dtype)
    return found


def own_scales(bases: Iterable[str], targets: Mapping[str, Target[StoredTensor]]) -> FoldedScales:
    """Return the fp32 scale [E] that an hf source has for each `down_proj` with a base; a nemo source has none."""
    stored = {down: targets[scale].source for scale, down in scales_with_base(bases).items()}
    return {down: source.parts[0].stored.read().astype(np.float32) for down, source in stored.items() if source}


def filled_in(source: Checkpoint, base: Checkpoint | None) -> tuple[Path, ...]:
    """Return the base's side files that a source lacks: all but its config and its card, which are of another model."""
    there = {path.name for path in source.side_files}
    files = () if base is None else base.side_files
    return tuple(path for path in files if path.name not in {*there, CONFIG_NAME, CARD_NAME})


def _check(experts: BaseExperts, target: Target[StoredTensor], scale_dtype: DType) -> None:
    if experts.weights.shape != target.shape:
        raise TensorShapeError(
            "the base has another shape",
            tensor=target.name,
            file=experts.scale.file.path,
            expected=target.shape,
            found=experts.weights.shape,
            hint=_NAME_IT,
        )
    for tensor, dtype in ((experts.weights.parts[0].stored, target.dtype), (experts.scale, scale_dtype)):
        if not dtypes.is_exact(tensor.dtype, dtype) and not (tensor is experts.scale and _holds_values(dtype, tensor)):
            raise UsageError(
                "the target's dtype does not hold the base's values",
                tensor=tensor.name,
                file=tensor.file.path,
                expected=f"{tensor.dtype.name}, or a dtype that holds it",
                found=dtype.name,
                hint=f"give --dtype {tensor.dtype.name}, or leave --base out",
            )


def _holds_values(dtype: DType, scale: StoredTensor) -> bool:
    """Return whether each value of a stored scale is exact in `dtype`, whatever the scale's own dtype."""
    values = scale.read()
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype.numpy()).astype(values.dtype)
    return cast.tobytes() == values.tobytes()


def scales_with_base(bases: Iterable[str]) -> dict[str, str]:
    """Return the `down_proj` of each `per_expert_scale` that is known only when all its experts are judged."""
    return {name.sibling(SCALE).hf: down for down in bases if (name := lookup(down, Layout.HF)) is not None}


def given_back_scales(bases: Mapping[str, BaseExperts], own: FoldedScales, pieces: Iterable[Piece]) -> FoldedScales:
    """Return the fp32 scale [E] of each layer with a base: the base's for experts that are its own.

    All others have that of `own_scales`, or else one. `pieces` are those of all experts, of all ranks and runs.
    """
    scales = {}
    pieces = [piece for piece in pieces if "given_back" in piece.facts]
    for name, down in scales_with_base(bases).items():
        scale = bases[down].read_scale()
        back = [expert for piece in pieces if piece.facts["tensor"] == down for expert in piece.facts["given_back"]]
        scales[name] = own[down].copy() if down in own else np.ones_like(scale)
        scales[name][back] = scale[back]
    return scales


class Unfolding:
    """Gives experts back to their base. Used by one thread."""

    def __init__(
        self,
        bases: Mapping[str, BaseExperts],
        own: FoldedScales,
        base_bytes: int,
        readers: Mapping[Readable, Reader],
        pool: Executor,
    ) -> None:
        """Read the scales of `bases`, which are by the target's names; an expert needs a buffer of `base_bytes`.

        `own` are those of `own_scales`.
        """
        self.bases = bases
        self.own = own
        self._scales = {name: base.read_scale() for name, base in bases.items()}
        self._buffer = allocate(base_bytes) if base_bytes else memoryview(b"")
        self._readers, self._pool = readers, pool

    def unfold(self, name: str, number: int, stored: Array, out: Array) -> bool:
        """Return whether expert `number` of a target is the base's, folded.

        It is `stored` as [I, H] in the nemo layout, or as [H, I] beside a scale of its own. If it is the base's, write
        the base's to `out` [H, I]. Read as far as that takes.
        """
        native = partial(_native, stored, self.own[name][number] if name in self.own else None)
        weights, scale = self.bases[name].weights, self._scales[name][number]
        size, width = weights.shape[1:]
        first = min(size, max(1, _FIRST // width))
        step = max(1, _PIECE // width)
        for end in (first, size):
            fold = partial(_fold_rows, self._read(weights, number, end), scale, native, out)
            pieces = [slice(row, min(row + step, end)) for row in range(0, end, step)]
            if not all(list(self._pool.map(fold, pieces))):
                return False
        return True

    def _read(self, weights: Source[StoredTensor], expert: int, rows: int) -> Array:
        """Return the first rows of one expert of a tensor [E, R, C] of the base; valid until the next call."""
        (read,) = weights.reads(expert, expert + 1)  # no form cuts the rows of a down_proj
        size = rows * weights.shape[2] * weights.dtype.itemsize
        start = read.stored.start + read.start
        raw = self._readers[read.stored.file].read(start, size, self._buffer)
        return np.frombuffer(raw, np.uint8).view(weights.dtype.numpy()).reshape(rows, -1)


def _native(stored: Array, scale: np.float32 | None, rows: slice) -> Array:
    """Return columns `rows` of a native expert [I, H] that is stored so, or as [H, I] beside its scale."""
    if scale is None:
        return stored[:, rows]
    native: Array = kernels.transpose_scale_cast(stored[rows][None], scale=[scale], dtype=stored.dtype, threads=1)[0]
    return native


def _fold_rows(weights: Array, scale: np.float32, native: Callable[[slice], Array], out: Array, rows: slice) -> bool:
    """Return whether rows of weights [H, I] fold to those columns of native [I, H]; if so, write them to `out`."""
    piece, expected = weights[rows], native(rows)
    again = kernels.transpose_scale_cast(piece[None], scale=[scale], dtype=expected.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), expected.view(np.uint8)):
        return False
    kernels.scale_cast(piece, out=out[rows], threads=1)
    return True
