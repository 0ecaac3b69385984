"""A weight stream as a `WeightSource`, the input of vLLM's weight transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_moe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma4_moe.refit.stream import WeightStream


def vllm_source(stream: WeightStream) -> Any:
    """Return `stream` as a `vllm.distributed.weight_transfer.base.WeightSource`.

    Every round sends every tensor, layer scalars and the ones of `per_expert_scale` too: a parameter that a round lacks
    is uninitialised memory in vLLM. The order is that of vLLM's own groups, in which a tensor outside all layers comes
    before or after the layers. Each of several trainer ranks makes a source.

    Raises:
        UsageError: The stream has several dtypes: vLLM packs tensors without alignment. Or the stream has a `dst`:
            vLLM's sender is always the first rank, and all ranks iterate.
    """
    if stream.dst is not None:
        raise UsageError("a stream for one rank", expected="dst=None", found=f"dst={stream.dst}", hint="leave dst out")
    plan = {planned.name: planned for planned in stream.plan()}
    first = next(iter(plan.values()))
    for other in plan.values():
        if other.dtype != first.dtype:
            raise UsageError(
                "a stream of several dtypes, which vLLM can't pack",
                tensor=other.name,
                expected=f"{first.dtype}, as {first.name}",
                found=other.dtype,
                hint='set dtype, e.g. WeightStream(..., dtype="bfloat16"), and exclude_key_regex for other tensors',
            )
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups

    names = [name for group in layerwise_groups(list(plan)) for name in group]

    class Source(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, getattr(torch, plan[name].dtype), plan[name].shape) for name in names]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            pairs, early = iter(stream), dict[str, torch.Tensor]()
            for name in names:
                while name not in early:
                    early.update([next(pairs)])  # such as a final norm that comes before another tower's layers
                yield name, early.pop(name)

    return Source()
