"""Names, axes and dtypes of tensors in the two layouts. Imports no torch, opens no file, reads no value.

Start with `table`: one row for each tensor, with its name and axes in both layouts and the operation between them.
Then `spellings`, the published forms of the hf layout, and `targets`, the tensors that a set of tensors becomes.

Words that have one meaning in the whole package:

    layout      hf or nemo: names, axes and dtypes of a model's tensors
    expert      one of the E feed-forward networks of a layer; E is axis 0 in both layouts
    role        the place of a tensor in its layer, a row of the table: gate_up, down, scale, ...
    fold        multiply an expert's down projection by its per_expert_scale: the way from hf to nemo
    spelling    a published form of the hf layout: which stored tensors make up each role
    part        a stored tensor, as the experts (start, end) and rows (start, end) of a role that it holds
    source      the parts that a target is made from
    target      a tensor of the layout that is converted to; the target directory holds them
    block       rows (start, end) of a target that are read, converted, written and resumed together
    piece       bytes (start, end) of a written file, with their hash
    shard file  one of the safetensors files of a checkpoint
    shard       the share of a tensor that one rank holds
    placement   how one dimension of a mesh cuts a tensor over ranks
    base        the hf checkpoint that a model was made from
    bucket      tensors side by side in one buffer of a weight stream

May import: errors, sizes.
"""

from gemma4_moe.layout.table import Layout

__all__ = ["Layout"]
