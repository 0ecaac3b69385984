"""Destinations: hf-layout views of a model's storage that a checkpoint reader fills, marked as such.

The mark is an attribute of the tensor object itself. A reader that returns the same object, as
`torch.distributed.checkpoint.load` does, returns the mark with it. `clone`, `detach`, `contiguous`, `deepcopy` and
pickle lose the mark, which makes the result an ordinary tensor. So no adapter has to remember an unfinished load.

Only the scale shows whether a reader filled its destination: it starts as one NaN of all the 2^24 - 2 that float32 has,
which no file of 16-bit scales can hold. The experts' views start with the model's values, since NaN there would cost
one write of the whole model before every load.
"""

from __future__ import annotations

import torch

_MARK = "_gemma4_moe_destination_of"


class _Mark:
    """Holds the model's tensor of a destination."""

    def __init__(self, native: torch.Tensor) -> None:
        self.native = native

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a deep copy or a pickle: those have storage of their own, which is no model's."""
        return type(None), ()


#: The bits of the NaN that an unfilled scale has: quiet, and with bits set that a 16-bit dtype lacks.
_UNFILLED = 0x7FC0_5A5A


def unfilled_scale(experts: int, device: torch.device) -> torch.Tensor:
    """Return a float32 scale [E] that no reader has filled."""
    return torch.full((experts,), _UNFILLED, dtype=torch.int32, device=device).view(torch.float32)


def unfilled(scale: torch.Tensor) -> int:
    """Return the number of experts whose scale no reader has filled."""
    return int((scale.view(torch.int32) == _UNFILLED).sum())


def mark(view: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
    """Mark `view` as a destination whose storage belongs to `native`, and return it."""
    setattr(view, _MARK, _Mark(native))
    return view


def native_of(value: object) -> torch.Tensor | None:
    """Return the model's tensor behind a destination, None for any other value."""
    return getattr(getattr(value, _MARK, None), "native", None)
