"""The documents that an adapter needs in a form, and the modules with the ranks and scalings that the form can say.

PEFT gives each module its own rank and alpha (`rank_pattern`, `alpha_pattern`). NeMo has one rank, one alpha, and
`moe_rank_scaling` for experts. vLLM has one scaling: where a module's differs, the ratio is multiplied into its B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.errors import UnsupportedCheckpointError
from gemma4_moe.layout.lora import EXPERTS, NEMO_EXPERTS, LoraForm, ParamWrapper
from gemma4_moe.layout.table import DOWN, GATE_UP
from gemma4_moe.lora.config import CONFIG_NAME, NATIVE_NAME, STAMP, VERSIONS
from gemma4_moe.lora.names import linear_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma4_moe.lora.modules import LoraModule
    from gemma4_moe.lora.opening import Adapter


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of an adapter in its new form.

    Attributes:
        files: Each document by its file's name.
        factors: The factor of B of each module whose scaling the form can't say; one for all others.
    """

    files: Mapping[str, Mapping[str, Any]]
    factors: Mapping[str, float]


def documents(adapter: Adapter, form: LoraForm, layout: ParamWrapper) -> Documents:
    """Return the documents of an adapter in a form.

    Raises:
        UnsupportedCheckpointError: The form can't say the ranks or the scalings of this adapter.
    """
    if form is LoraForm.PEFT:
        return Documents(_peft(adapter, layout), {})
    if form is LoraForm.NEMO:
        return Documents(_nemo(adapter), {})
    return _vllm(adapter)


def _common(adapter: Adapter) -> dict[str, Any]:
    said = adapter.config.document
    return {
        "base_model_name_or_path": said.get("base_model_name_or_path"),
        "bias": "none",
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": said.get("task_type", "CAUSAL_LM"),
    }


def _linear(adapter: Adapter, form: LoraForm) -> list[str]:
    return [linear_in(module.name, form) for module in adapter.modules.values() if not module.is_experts]


def _experts(adapter: Adapter) -> list[LoraModule]:
    return [module for module in adapter.modules.values() if module.is_experts]


def _peft(adapter: Adapter, layout: ParamWrapper) -> dict[str, dict[str, Any]]:
    config, experts = adapter.config, _experts(adapter)
    rank, alpha, is_rslora = config.rank, config.alpha, config.is_rslora
    modules = adapter.modules.values()
    if adapter.form is LoraForm.VLLM:  # its modules' alphas are made from the one scaling
        first = next(iter(modules))
        rank, alpha = first.rank, first.alpha
    document = _common(adapter) | {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": is_rslora,
        "target_modules": _linear(adapter, LoraForm.PEFT),
        "rank_pattern": {module.name: module.rank for module in modules if module.rank != rank},
        "alpha_pattern": {module.name: _plain(module.alpha) for module in modules if module.alpha != alpha},
        "lora_dropout": 0.0 if experts else _dropout(adapter),
        "peft_version": VERSIONS[layout],
    }
    if experts:
        document["target_parameters"] = [module.name for module in experts]
    files = {CONFIG_NAME: document}
    if config.native is not None:
        files[NATIVE_NAME] = config.native | ({STAMP: str(layout)} if experts else {})
    elif experts and _dropout(adapter):
        files[NATIVE_NAME] = _native(adapter) | {STAMP: str(layout)}
    return files


def _dropout(adapter: Adapter) -> Any:
    return (adapter.config.native or {}).get("dropout", adapter.config.document.get("lora_dropout", 0.0))


def _native(adapter: Adapter) -> dict[str, Any]:
    """Return NeMo's document: its own where the adapter has one."""
    paths = {module.name.rpartition(".")[0].removesuffix(EXPERTS) + NEMO_EXPERTS for module in _experts(adapter)}
    made = {
        "target_modules": [*_linear(adapter, LoraForm.NEMO), *sorted(paths)],
        "exclude_modules": [],
        "match_all_linear": False,
        "use_dora": False,
        "dropout": _dropout(adapter),
        "dropout_position": "pre",  # PEFT's
        "moe_rank_scaling": False,
    }
    return made if adapter.config.native is None else {k: v for k, v in adapter.config.native.items() if k != STAMP}


def _nemo(adapter: Adapter) -> dict[str, dict[str, Any]]:
    modules = list(adapter.modules.values())
    alphas = {module.name: module.alpha * (module.rank**0.5 if adapter.config.is_rslora else 1) for module in modules}
    experts = {module.name: module.rank for module in modules if module.is_experts}
    linear = {module.name: module.rank for module in modules if not module.is_experts}
    for what, values in (("alpha", alphas), ("rank of linear modules", linear), ("rank of experts", experts)):
        _require_one(adapter, what, values)
    (alpha,) = set(alphas.values())
    native, said = _native(adapter), adapter.config
    rank = next(iter(linear.values()), said.rank if said.has_own_expert_rank else next(iter(experts.values()), 0))
    expert_rank = next(iter(experts.values()), rank)
    if expert_rank != rank and not said.has_own_expert_rank:
        name = next(iter(experts))
        raise _unsaid(adapter, name, f"rank {rank}, as linear modules have, or moe_rank_scaling", f"rank {expert_rank}")
    layers = {module.layer for module in _experts(adapter)}
    for key in layers:
        own = [module.rule for module in _experts(adapter) if module.layer == key]
        if len(own) == 1:
            name = next(module.name for module in _experts(adapter) if module.layer == key)
            raise _unsaid(
                adapter, name, f"both {GATE_UP.role} and {DOWN.role}", f"{own[0].role} alone" if own[0] else ""
            )
    document = _common(adapter) | {"r": rank, "lora_alpha": _plain(alpha), "use_dora": False}
    document["target_modules"] = _linear(adapter, LoraForm.PEFT)
    return {CONFIG_NAME: document, NATIVE_NAME: native}


def _require_one(adapter: Adapter, what: str, values: Mapping[str, float]) -> None:
    first = next(iter(values), None)
    for name, value in values.items():
        if first is not None and value != values[first]:
            raise _unsaid(adapter, name, f"one {what}: {_plain(values[first])}, as {first} has", str(_plain(value)))


def _unsaid(adapter: Adapter, module: str, expected: str, found: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "an adapter that NeMo's form can't hold",
        form=f"LoRA in {adapter.form}'s form",
        tensor=module,
        file=adapter.path,
        expected=expected,
        found=found,
        hint="merge it into its base instead: gemma4-moe merge BASE ADAPTER DST --to nemo",
    )


def _vllm(adapter: Adapter) -> Documents:
    modules = list(adapter.modules.values())
    rank = max(module.rank for module in modules)
    first = next(module for module in modules if module.rank == rank)
    shared = adapter.scaling_of(first)
    factors = {module.name: adapter.scaling_of(module) / shared for module in modules}
    document = _common(adapter) | {"r": rank, "lora_alpha": _plain(shared * rank), "use_rslora": False}
    projections = ["gate_proj", "up_proj", "down_proj"]
    named = projections if _experts(adapter) else []
    document["target_modules"] = sorted(
        {name.rpartition(".")[2] for name in _linear(adapter, LoraForm.VLLM)} | {*named}
    )
    return Documents({CONFIG_NAME: document}, {name: factor for name, factor in factors.items() if factor != 1})


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
