"""The base of a conversion to hf: an hf checkpoint whose experts the model may still hold, folded.

The base's expert is folded again, and its bits are compared with the native ones. An expert that is still the base's
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
from gemma4_moe.checkpoint.readers import allocate
from gemma4_moe.checkpoint.recognition import checkpoint_targets, recognise
from gemma4_moe.checkpoint.side_files import is_tokenizer_file
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Executor
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.checkpoint.file import OpenFile
    from gemma4_moe.checkpoint.readers import Reader
    from gemma4_moe.checkpoint.stored import StoredTensor
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.targets import Source, Target
    from gemma4_moe.target.pieces import Piece

    Array = np.ndarray[Any, np.dtype[Any]]
    FoldedScales = Mapping[str, Array]

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
    """Return the base's experts for each `down_proj` of a target, by its name, after checking that they fit it."""
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
        native = targets.get(target.origin.name)  # the nemo layout's name is one, whatever the base's spelling
        if native is None:
            raise UsageError("the base lacks a layer of the model", tensor=name, file=base.path, hint=_NAME_IT)
        assert native.source is not None, "a down_proj has a source"
        assert native.scale is not None, "a down_proj of the hf layout has a scale"
        found[name] = BaseExperts(native.source, native.scale)
        _check(found[name], target)
    return found


def filled_in(source: Checkpoint, base: Checkpoint | None) -> tuple[Path, ...]:
    """Return the base's files of tokenizer, template and processor that a source lacks."""
    there = {path.name for path in source.side_files}
    files = () if base is None else base.side_files
    return tuple(path for path in files if path.name not in there and is_tokenizer_file(path.name))


def _check(experts: BaseExperts, target: Target[StoredTensor]) -> None:
    if experts.weights.shape != target.shape:
        raise TensorShapeError(
            "the base has another shape",
            tensor=target.name,
            file=experts.scale.file.path,
            expected=target.shape,
            found=experts.weights.shape,
            hint=_NAME_IT,
        )
    for tensor in (experts.weights.parts[0].stored, experts.scale):
        if not dtypes.is_exact(tensor.dtype, target.dtype) and not (
            tensor is experts.scale and _holds_values(target.dtype, tensor)
        ):
            raise UsageError(
                "the target's dtype does not hold the base's values",
                tensor=tensor.name,
                file=tensor.file.path,
                expected=f"{tensor.dtype.name}, or a dtype that holds it",
                found=target.dtype.name,
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


def given_back_scales(bases: Mapping[str, BaseExperts], pieces: Iterable[Piece]) -> FoldedScales:
    """Return the fp32 scale [E] of each layer with a base: the base's for experts that are its own, else one.

    `pieces` are those of all experts, of all ranks and runs.
    """
    scales = {}
    pieces = [piece for piece in pieces if "given_back" in piece.facts]
    for name, down in scales_with_base(bases).items():
        scale = bases[down].read_scale()
        own = [expert for piece in pieces if piece.facts["tensor"] == down for expert in piece.facts["given_back"]]
        scales[name] = np.ones_like(scale)
        scales[name][own] = scale[own]
    return scales


class Unfolding:
    """Gives experts back to their base. Used by one thread."""

    def __init__(
        self, bases: Mapping[str, BaseExperts], base_bytes: int, readers: Mapping[OpenFile, Reader], pool: Executor
    ) -> None:
        """Read the scales of `bases`, which are by the target's names; an expert needs a buffer of `base_bytes`."""
        self.bases = bases
        self._scales = {name: base.read_scale() for name, base in bases.items()}
        self._buffer = allocate(base_bytes) if base_bytes else memoryview(b"")
        self._readers, self._pool = readers, pool

    def unfold(self, name: str, number: int, native: Array, out: Array) -> bool:
        """Return whether expert `number` of a target, `native` [I, H], is the base's, folded.

        If so, write the base's to `out` [H, I]. Read as far as that takes.
        """
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


def _fold_rows(weights: Array, scale: np.float32, native: Array, out: Array, rows: slice) -> bool:
    """Return whether rows of weights [H, I] fold to those columns of native [I, H]; if so, write them to `out`."""
    piece = weights[rows]
    again = kernels.transpose_scale_cast(piece[None], scale=[scale], dtype=native.dtype, threads=1)[0]
    if not np.array_equal(again.view(np.uint8), native[:, rows].view(np.uint8)):
        return False
    kernels.scale_cast(piece, out=out[rows], threads=1)
    return True
