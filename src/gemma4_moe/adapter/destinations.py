"""Destinations: hf-layout views of a model's storage that a checkpoint reader fills, and how they are told apart.

A destination carries a mark: an attribute of the tensor object itself. Whoever hands the same object back (as
`torch.distributed.checkpoint.load` does) hands back the mark; `clone`, `detach`, `contiguous`, `deepcopy` and pickle
lose it, and then the tensor is an ordinary one. So no adapter has to remember that a load is under way.

Whether a destination was loaded shows in the scale alone, which starts as NaN. The views of the experts start with the
values that the model has: a NaN there would have to be written through the whole model before every load.
"""

from __future__ import annotations

import torch

_MARK = "_gemma4_moe_destination_of"


class _Mark:
    """What a destination carries: the model's tensor behind it."""

    def __init__(self, native: torch.Tensor) -> None:
        self.native = native

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a deep copy or a pickle: those have storage of their own, which is no model's."""
        return type(None), ()


def mark(view: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
    """Mark `view` as a destination whose storage belongs to `native`, and return it."""
    setattr(view, _MARK, _Mark(native))
    return view


def native_of(value: object) -> torch.Tensor | None:
    """Return the model's tensor behind a destination, None for any other value."""
    found: _Mark | None = getattr(value, _MARK, None)
    return None if found is None else found.native


def unfilled_scale(native: torch.Tensor) -> torch.Tensor:
    """Return a scale [E] for `native` [E, I, H] that says "not loaded".

    It is fp32, so that no scale is rounded on its way in, and full of NaN.
    """
    return torch.full(native.shape[:1], float("nan"), dtype=torch.float32, device=native.device)
