"""Exact Gemma 4 mixture-of-experts checkpoints between the Hugging Face and NeMo layouts.

These names are the public face; whatever else a program needs is imported from its package, such as `MoEConfig` from
`gemma4_moe.adapter` or `Layout` from `gemma4_moe.layout`. A name is imported when it is first used, so that
`import gemma4_moe` costs next to nothing and torch is loaded only for the names that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gemma4_moe.version import __version__

if TYPE_CHECKING:
    from gemma4_moe.adapter.state_dict_adapter import Gemma4MoEStateDictAdapter as Gemma4MoEStateDictAdapter
    from gemma4_moe.converter.convert import convert as convert
    from gemma4_moe.converter.inspect import inspect as inspect
    from gemma4_moe.converter.merge import merge as merge
    from gemma4_moe.converter.preview import plan as plan
    from gemma4_moe.errors import Gemma4MoEError as Gemma4MoEError
    from gemma4_moe.lora.convert import convert_lora as convert_lora
    from gemma4_moe.model_io.load import load_hf as load_hf
    from gemma4_moe.model_io.save import save_hf as save_hf
    from gemma4_moe.publishing.publish import publish as publish
    from gemma4_moe.refit.stream import WeightStream as WeightStream
    from gemma4_moe.verifier.diff import diff as diff
    from gemma4_moe.verifier.verify import verify as verify

_HOME = {
    "Gemma4MoEError": "errors",
    "Gemma4MoEStateDictAdapter": "adapter.state_dict_adapter",
    "WeightStream": "refit.stream",
    "convert": "converter.convert",
    "convert_lora": "lora.convert",
    "diff": "verifier.diff",
    "inspect": "converter.inspect",
    "load_hf": "model_io.load",
    "merge": "converter.merge",
    "plan": "converter.preview",
    "publish": "publishing.publish",
    "save_hf": "model_io.save",
    "verify": "verifier.verify",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
