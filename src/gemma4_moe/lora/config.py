"""The documents beside an adapter's weights: adapter_config.json, and NeMo AutoModel's automodel_peft_config.json.

The scaling of a module is alpha / r, or alpha / √r with rsLoRA.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.storage import read_whole, refusals
from gemma4_moe.errors import ConfigError, UnsupportedCheckpointError
from gemma4_moe.layout.lora import ParamWrapper

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
NATIVE_NAME = "automodel_peft_config.json"

#: The key of NeMo's document that names the layout of PEFT's wrapper.
STAMP = "paramwrapper_layout"

#: The longest such document that is read, in bytes. One that names each matrix of the 26B has about a megabyte.
LONGEST = 10 * 2**20

#: The first release of PEFT with today's layout of 3-D experts.
_CURRENT_VERSION = (0, 19, 1)

#: Releases of PEFT that have each layout, as its own stamp names them.
VERSIONS = {ParamWrapper.CURRENT: "0.19.1", ParamWrapper.LEGACY: "0.18.1"}

#: Options under which a change is not scaling · B · A on the base's own weights.
_OTHER_MATHS = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "use_qalora",
    "use_bdlora",
    "megatron_config",
)

#: Starts of `init_lora_weights` under which PEFT changes the base's weights too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: A pattern that names one module, or the end of a module's name.
_PATTERN = re.compile(r"(?P<start>\^?)(\.\*(\\?\.)?)?(?P<name>(\w|-|\\?\.)+)\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The documents of an adapter.

    Attributes:
        path: Its adapter_config.json.
        rank: The rank r of each module that `ranks` does not name.
        alpha: Its alpha likewise.
        is_rslora: Whether scaling is alpha / √r.
        ranks: Ranks by the end of a module's name.
        alphas: Alphas likewise.
        parameters: The names in `target_parameters`.
        stamp: The layout of PEFT's wrapper that a stamp tells, or None.
        document: The whole adapter_config.json.
        native: The whole automodel_peft_config.json, or None.
    """

    path: Path
    rank: int
    alpha: float
    is_rslora: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]
    stamp: ParamWrapper | None
    document: dict[str, Any] = field(repr=False)
    native: dict[str, Any] | None = field(repr=False)

    def rank_of(self, module: str) -> int:
        """Return the rank that the document gives a module."""
        return int(_of(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the document gives a module."""
        return _of(self.alphas, module, self.alpha)

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of B · A."""
        return scaling(rank, alpha, is_rslora=self.is_rslora)

    @property
    def has_own_expert_rank(self) -> bool:
        """Whether NeMo has divided the rank of experts by the experts of a token (`moe_rank_scaling`)."""
        return bool((self.native or {}).get("moe_rank_scaling"))


def is_adapter(path: Path) -> bool:
    """Return whether a directory has an adapter and no other weights."""
    with refusals("look at the directory", path):
        if not (path / WEIGHTS_NAME).is_file():
            return False
        return [*path.glob("*.safetensors")] == [path / WEIGHTS_NAME]


def scaling(rank: int, alpha: float, *, is_rslora: bool) -> float:
    """Return the factor of B · A."""
    return float(alpha / rank**0.5 if is_rslora else alpha / rank)


def _of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that is a module's name or the end of it."""
    return next((value for key, value in patterns.items() if f".{module}".endswith(f".{key}")), default)


def read_lora_config(directory: Path) -> LoraConfig:
    """Read the documents of an adapter's directory.

    Raises:
        ConfigError: A document is missing, no JSON object, or has a value without meaning.
        UnsupportedCheckpointError: It describes another method than LoRA, or an option that is not carried.
    """
    path = directory / CONFIG_NAME
    document = _read_object(path)
    native = _read_object(directory / NATIVE_NAME) if (directory / NATIVE_NAME).exists() else None
    _refuse_other_maths(document, path)
    rank = _number(path, document, "r")
    if rank != int(rank):
        raise _senseless(path, "r", "an integer", rank)
    parameters = document.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise _senseless(path, "target_parameters", "a list of names", parameters)
    return LoraConfig(
        path=path,
        rank=int(rank),
        alpha=_number(path, document, "lora_alpha"),
        is_rslora=document.get("use_rslora") is True,
        ranks=_patterns(path, document, "rank_pattern"),
        alphas=_patterns(path, document, "alpha_pattern"),
        parameters=tuple(parameters),
        stamp=_stamp(directory, document, native),
        document=document,
        native=native,
    )


def _read_object(path: Path) -> dict[str, Any]:
    raw = read_whole(path, LONGEST)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        hint = "get the adapter's directory again"
        raise ConfigError(f"{path.name} is not JSON", file=path, found=str(error)[:200], hint=hint) from error
    if not isinstance(document, dict):
        raise _senseless(path, "the document", "an object", document)
    return document


def _refuse_other_maths(document: Mapping[str, Any], path: Path) -> None:
    kind = document.get("peft_type", "LORA")
    init = document.get("init_lora_weights")
    names = [name for name in _OTHER_MATHS if document.get(name)]
    if names[:1] == ["use_dora"]:
        problem, form, found = "a DoRA adapter, which is not carried", "DoRA", "use_dora"
    elif kind != "LORA":
        problem, form, found = "an adapter of another method than LoRA", str(kind), f"peft_type {kind}"
    elif document.get("bias", "none") != "none":
        problem, form, found = "an adapter that trains biases", "LoRA with biases", f"bias {document['bias']}"
    elif isinstance(init, str) and init.startswith(_CHANGES_BASE):
        problem, form = "an adapter whose start has changed the weights of its base", init
        found = f"init_lora_weights {init}"
    elif names:
        problem, form, found = "an adapter with an option that is not carried", names[0], ", ".join(names)
    else:
        return
    hint = "merge it with the program that trained it (PEFT: merge_and_unload), and convert the merged model"
    raise UnsupportedCheckpointError(problem, form=form, file=path, expected="plain LoRA", found=found, hint=hint)


def _patterns(path: Path, document: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a pattern's values by names. Patterns are PEFT's regular expressions; those of names alone are read."""
    patterns = document.get(name) or {}
    if not isinstance(patterns, dict):
        raise _senseless(path, name, "an object", patterns)
    found = {}
    for pattern in patterns:
        match = _PATTERN.fullmatch(pattern)
        if match is None or match["start"]:
            raise _senseless(path, name, "names of modules, or ends of them", pattern)
        found[match["name"].replace("\\", "")] = _number(path, patterns, pattern)
    return found


def _stamp(directory: Path, document: Mapping[str, Any], native: Mapping[str, Any] | None) -> ParamWrapper | None:
    """Return the layout that NeMo's stamp or PEFT's version tells, in this order."""
    if native is not None and STAMP in native:
        if native[STAMP] not in list(ParamWrapper):
            raise _senseless(directory / NATIVE_NAME, STAMP, " or ".join(ParamWrapper), native[STAMP])
        return ParamWrapper(native[STAMP])
    if (version := document.get("peft_version")) is None:
        return None
    match = (
        re.match(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})", version, re.ASCII) if isinstance(version, str) else None
    )
    if match is None:
        raise _senseless(directory / CONFIG_NAME, "peft_version", "a version such as 0.19.1", version)
    is_current = tuple(map(int, match.groups())) >= _CURRENT_VERSION
    return ParamWrapper.CURRENT if is_current else ParamWrapper.LEGACY


def _number(path: Path, document: Mapping[str, Any], name: str) -> float:
    value: Any = document.get(name)
    if type(value) not in (int, float) or not 0 < value < 2**31:
        raise _senseless(path, name, "a positive number", value)
    return float(value)


def _senseless(path: Path, name: str, expected: str, found: object) -> ConfigError:
    problem, hint = f"{name} in {path.name} has no sensible value", "get the adapter's directory again, or mend it"
    return ConfigError(problem, file=path, expected=expected, found=f"{found!r:.200}", hint=hint)
