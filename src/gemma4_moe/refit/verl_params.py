"""A weight stream as verl's per-tensor generator, the input of its rollouts' `update_weights`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from gemma4_moe.refit.stream import WeightStream


def per_tensor_param(stream: WeightStream) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
    """Return a pass of `stream` in the form of verl's `BaseEngine.get_per_tensor_param`.

    The second value is verl's LoRA configuration: there is none. Values are read while verl iterates, so the model may
    be offloaded only after the update. Each tensor has memory of its own: verl's SGLang rollout keeps the tensors of a
    bucket until it sends them. Every trainer rank iterates.

    Raises:
        UsageError: The stream has a `dst`: each rank of verl feeds an engine of its own.
    """
    if stream.dst is not None:
        raise UsageError("a stream for one rank", expected="dst=None", found=f"dst={stream.dst}", hint="leave dst out")
    return iter(stream), None
