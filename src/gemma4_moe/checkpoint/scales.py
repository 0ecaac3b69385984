"""A `per_expert_scale` for a checkpoint that has lost it: ones, or that of the checkpoint that it was trained from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.stored import StoredTensor
from gemma4_moe.errors import TensorShapeError, UsageError
from gemma4_moe.layout.names import lookup
from gemma4_moe.layout.table import DOWN, SCALE, Layout

if TYPE_CHECKING:
    import numpy as np

    from gemma4_moe.checkpoint.directory import Checkpoint
    from gemma4_moe.layout.dtypes import DType
    from gemma4_moe.layout.names import MoEName

#: The values of `scale` that have a meaning.
ONES = "ones"


class _Ones(SafetensorsFile):
    """A file of nothing but ones of one dtype, of any length, that is on no disk."""

    def __init__(self, dtype: DType) -> None:
        """Take the dtype."""
        import numpy as np

        self.path = Path(ONES)
        self._descriptor = -1
        self._one: np.ndarray[tuple[int], np.dtype[np.uint8]] = np.ones(1, dtype.numpy()).view(np.uint8)

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the bytes from `offset` on, where an element begins."""
        import numpy as np

        assert offset % self._one.size == 0, "scales are read by whole elements"
        wanted = np.frombuffer(destination, np.uint8)
        wanted[...] = np.resize(self._one, wanted.size)


def with_scales(checkpoint: Checkpoint, scale: str | None, origin: Checkpoint | None) -> Checkpoint:
    """Return an hf checkpoint, of which no layer has a scale, with one for each layer.

    Args:
        checkpoint: An open checkpoint. It comes back as it is if neither of the others is given.
        scale: "ones", or None.
        origin: The open hf checkpoint that has the scales, or None.

    Raises:
        UsageError: Both are given; `scale` is another word; or a layer has a scale, or `origin` has none for a layer.
        TensorShapeError: The scale is of another number of experts.
    """
    if scale is None and origin is None:
        return checkpoint
    if scale not in (None, ONES) or (scale is not None and origin is not None):
        expected = f"--scale {ONES}, or --scale-from CHECKPOINT"
        raise UsageError("no way to give a scale", expected=expected, found=repr(scale))
    named = {tensor.name: lookup(tensor.name, Layout.HF) for tensor in checkpoint.tensors.values()}
    own = [name for name, parsed in named.items() if parsed is not None and parsed.rule is SCALE]
    if own:
        raise UsageError(
            "the checkpoint has a per_expert_scale of its own",
            tensor=own[0],
            file=checkpoint.path,
            hint="leave --scale and --scale-from out",
        )
    downs: dict[str, list[str]] = {}
    for name, parsed in named.items():
        if parsed is not None and parsed.rule is DOWN:
            downs.setdefault(parsed.sibling(SCALE).hf, []).append(name)
    given = {}
    for wanted, names in downs.items():
        layer, down = named[names[0]], checkpoint.tensors[names[0]]
        assert layer is not None, "a name of down_proj"
        count = len(names) if layer.part.expert is not None else down.shape[0]
        given[wanted] = _ones(wanted, down.dtype, count) if origin is None else _of_origin(layer, count, origin)
    return replace(checkpoint, tensors=checkpoint.tensors | given)


def _ones(name: str, dtype: DType, count: int) -> StoredTensor:
    return StoredTensor(name, dtype, (count,), 0, count * dtype.itemsize, _Ones(dtype))


def _of_origin(layer: MoEName, count: int, origin: Checkpoint) -> StoredTensor:
    """Return the scale of a layer in the checkpoint that has it, under the current name."""
    wanted = layer.sibling(SCALE).hf
    for name, stored in origin.tensors.items():
        found = lookup(name, Layout.HF)
        if found is not None and found.hf == wanted:
            if stored.shape != (count,):
                raise TensorShapeError(
                    "the scale is of another number of experts",
                    tensor=name,
                    file=stored.file.path,
                    expected=[count],
                    found=list(stored.shape),
                    hint="name the checkpoint that the model was trained from",
                )
            return replace(stored, name=wanted)
    raise UsageError(
        "the checkpoint that should have the scales lacks one",
        tensor=wanted,
        file=origin.path,
        hint="name the published hf checkpoint that the model was trained from",
    )
