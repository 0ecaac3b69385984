"""`Gemma4MoEStateDictAdapter`: state dicts between the two layouts, in memory and across ranks.

May import: errors, sizes, layout, kernels, distributed.
"""
