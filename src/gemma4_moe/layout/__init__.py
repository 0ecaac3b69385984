"""What tensors are called in the two layouts, their axes and their dtypes. No torch, no file, no value.

Start with `table`: one row for each tensor, with its name and axes in both layouts and the operation between them.

May import: errors, sizes.
"""

from gemma4_moe.layout.table import Layout

__all__ = ["Layout"]
