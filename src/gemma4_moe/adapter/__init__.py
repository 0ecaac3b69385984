"""`Gemma4MoEStateDictAdapter`: state dicts between the two layouts, in memory and across ranks.

Here are the names that go with it and need no torch: the interface that it implements, and plain configs for programs
that have none of NeMo's.

May import: errors, sizes, layout, kernels, distributed.
"""

from gemma4_moe.adapter.configs import BackendConfig, MoEConfig
from gemma4_moe.adapter.interface import StateDictAdapter

__all__ = ["BackendConfig", "MoEConfig", "StateDictAdapter"]
