"""The arguments of a stream: their checks, and the sizes that a state or its adapter gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_moe.adapter.configs import axis_sizes
from gemma4_moe.adapter.state_dict_adapter import Gemma4MoEStateDictAdapter
from gemma4_moe.errors import UsageError

if TYPE_CHECKING:
    from gemma4_moe.refit.state import State


def check_sizes(bucket_bytes: int, oversize: str, buffers: int | None) -> None:
    """Check the arguments that say how large buckets are, and how many."""
    if oversize not in ("error", "own"):
        raise UsageError("no such value of oversize", expected="error or own", found=repr(oversize))
    if bucket_bytes < 1:
        raise UsageError("a bucket without room", expected="bucket_bytes of 1 or more", found=bucket_bytes)
    if buffers is not None and buffers < 2:
        hint = "give 2 or more: one is read while the next is filled"
        raise UsageError("too few buffers", expected="2 or more", found=buffers, hint=hint)


def adapter_of(state: State) -> Gemma4MoEStateDictAdapter | None:
    """Return a module's own adapter, unless it is of another library."""
    own = getattr(state, "state_dict_adapter", None)
    return own if isinstance(own, Gemma4MoEStateDictAdapter) else None


def sizes_of(state: State, adapter: Any) -> dict[str, int]:
    """Return the sizes of E, H and I that an adapter's configs or a module's own give."""
    if adapter is None:
        return axis_sizes(getattr(state, "config", None), None)
    return axis_sizes(adapter.config, adapter.moe_config)
