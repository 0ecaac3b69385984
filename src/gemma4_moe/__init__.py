"""Exact Gemma 4 mixture-of-experts checkpoints between the Hugging Face and NeMo layouts.

Public names are imported when they are first used, so that `import gemma4_moe` costs next to nothing and the parts
that need no torch don't load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4_moe.configs import BackendConfig as BackendConfig
    from gemma4_moe.configs import MoEConfig as MoEConfig
    from gemma4_moe.converting import convert as convert
    from gemma4_moe.differing import diff as diff
    from gemma4_moe.errors import Gemma4MoEError as Gemma4MoEError
    from gemma4_moe.inspecting import inspect as inspect
    from gemma4_moe.interface import StateDictAdapter as StateDictAdapter
    from gemma4_moe.layouts import Layout as Layout
    from gemma4_moe.previewing import plan as plan
    from gemma4_moe.sharded_loading import load_hf as load_hf
    from gemma4_moe.sharded_saving import save_hf as save_hf
    from gemma4_moe.state_dict_adapter import Gemma4MoEStateDictAdapter as Gemma4MoEStateDictAdapter
    from gemma4_moe.verifying import verify as verify

_HOME = {
    "BackendConfig": "configs",
    "Gemma4MoEError": "errors",
    "Gemma4MoEStateDictAdapter": "state_dict_adapter",
    "Layout": "layouts",
    "MoEConfig": "configs",
    "StateDictAdapter": "interface",
    "convert": "converting",
    "diff": "differing",
    "inspect": "inspecting",
    "load_hf": "sharded_loading",
    "plan": "previewing",
    "save_hf": "sharded_saving",
    "verify": "verifying",
}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
