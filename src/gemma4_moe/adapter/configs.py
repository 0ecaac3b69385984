"""The sizes and the kernel that the adapter reads from a model's configuration.

Any object with these attributes serves, or a dict with these keys: a transformers config, NeMo's own `MoEConfig` and
`BackendConfig`, or the classes here. A value of another type counts as absent, as those of a `Mock` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
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

    A size is read from the config itself if it has an integer there, else from its `text_config`.

    Raises:
        ConfigError: The configs disagree, or a size is less than one.
    """
    sizes: dict[str, int] = {}
    for axis, (text_name, moe_name) in SIZE_FIELDS.items():
        own, nested = _integer(config, text_name), _integer(_field(config, "text_config"), text_name)
        for name, value in ((text_name, nested if own is None else own), (moe_name, _integer(moe_config, moe_name))):
            if value is None:
                continue
            if value < 1:
                hint = "give the model's own config"
                raise ConfigError(f"{name} is no size", expected="a positive integer", found=value, hint=hint)
            if sizes.setdefault(axis, value) != value:
                raise ConfigError(
                    f"config and moe_config disagree about {axis}",
                    expected=f"{text_name} = {sizes[axis]}",
                    found=f"{moe_name} = {value}",
                    hint="give the config and the moe_config of one model",
                )
    return sizes


def decoder_layers(config: Any) -> int:
    """Return the number of decoder layers that a config gives, 0 if it gives none."""
    nested = _field(config, "text_config")
    return _integer(config, "num_hidden_layers") or _integer(nested, "num_hidden_layers") or 0


def conversion_of(backend: Any) -> Conversion:
    """Return the kernel that `backend` names, or "auto"; an unknown name is a UsageError."""
    name, known = _field(backend, "conversion"), get_args(Conversion)
    if not isinstance(name, str):
        return "auto"
    if name not in known:
        hint = "set backend.conversion to one of these, or leave it out"
        raise UsageError("unknown kernel", expected=f"one of {', '.join(known)}", found=repr(name), hint=hint)
    return cast("Conversion", name)


def _field(source: Any, name: str) -> Any:
    """Return a field of an object or of a mapping; None if it has none."""
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _integer(source: Any, name: str) -> int | None:
    """Return a field that is an integer, None for any other."""
    value = _field(source, name)
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
