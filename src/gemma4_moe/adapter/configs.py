"""The sizes and the kernel that the adapter reads from a model's configuration.

Any object with these attributes serves: a transformers config, NeMo's own `MoEConfig` and `BackendConfig`, or the
classes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from gemma4_moe.errors import ConfigError, UsageError
from gemma4_moe.layout.table import SIZE_FIELDS

Conversion = Literal["auto", "cpu", "triton", "torch"]


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The sizes E, H and I of a mixture of experts, under NeMo AutoModel's names.

    None takes a size from the model's config, or else from the tensors.
    """

    n_routed_experts: int
    dim: int | None = None
    moe_inter_dim: int | None = None


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """The name of the kernel; "auto" chooses by device, dtype and layout."""

    conversion: Conversion = "auto"


def axis_sizes(config: Any, moe_config: Any) -> dict[str, int]:
    """Return the sizes of E, H and I that the configs, if any, give.

    Raises:
        ConfigError: The configs disagree, or a size is not a positive integer.
    """
    text_config = getattr(config, "text_config", None) or config
    sizes: dict[str, int] = {}
    for axis, (text_name, moe_name) in SIZE_FIELDS.items():
        for source, name in ((text_config, text_name), (moe_config, moe_name)):
            value = getattr(source, name, None)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                hint = "give the model's own config"
                raise ConfigError(f"{name} is no size", expected="a positive integer", found=repr(value), hint=hint)
            if sizes.setdefault(axis, value) != value:
                raise ConfigError(
                    f"config and moe_config disagree about {axis}",
                    expected=f"{text_name} = {sizes[axis]}",
                    found=f"{moe_name} = {value}",
                    hint="give the config and the moe_config of one model",
                )
    return sizes


def conversion_of(backend: Any) -> Conversion:
    """Return the kernel that `backend` names, or "auto"; an unknown name is a UsageError."""
    name, known = getattr(backend, "conversion", "auto"), get_args(Conversion)
    if name not in known:
        hint = "set backend.conversion to one of these, or leave it out"
        raise UsageError("unknown kernel", expected=f"one of {', '.join(known)}", found=repr(name), hint=hint)
    return cast("Conversion", name)
