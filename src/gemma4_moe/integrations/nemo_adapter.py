"""Our adapter as a class of NeMo AutoModel's: what its `isinstance` and `getattr` look for, and nothing else.

Conversion is our adapter's own; of NeMo's base classes only the names count.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from gemma4_moe.adapter.state_dict_adapter import Gemma4MoEStateDictAdapter
from gemma4_moe.integrations import nemo_contract
from gemma4_moe.layout.table import DOWN, GATE_UP

if TYPE_CHECKING:
    from gemma4_moe.adapter.interface import StateDict


@cache
def adapter_class() -> type[Gemma4MoEStateDictAdapter]:
    """Return our adapter's class, derived from NeMo's `StateDictAdapter` and `MoESplitExpertsStateDictMixin` too.

    Raises:
        UsageError: NeMo AutoModel is not installed.
    """
    nemo = nemo_contract.find()

    class Installed(Gemma4MoEStateDictAdapter, nemo.mixin, nemo.interface):  # type: ignore[misc, name-defined]
        __doc__ = Gemma4MoEStateDictAdapter.__doc__

        #: How NeMo names the experts in adapter_config.json's `target_parameters`.
        _v5_peft_target_parameters = (GATE_UP.hf, DOWN.hf)

        def get_hf_state_dict_keys(self, state_dict: StateDict) -> list[str]:
            """Return the names that NeMo will save: it leaves a module's extra state out of hf checkpoints."""
            return [name for name in super().get_hf_state_dict_keys(state_dict) if "_extra_state" not in name]

    # NeMo-RL looks for a class by the ending of its name, and messages of NeMo show it.
    Installed.__name__ = Installed.__qualname__ = Gemma4MoEStateDictAdapter.__name__
    return Installed
