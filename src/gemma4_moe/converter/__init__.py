"""Checkpoints on disk: `convert`, `merge`, `plan` and `inspect`. No model is built, no torch is loaded.

A plan is made from headers (`plan`) and cut into blocks of experts (`blocks`). Each block is read, converted, hashed
and written by `steps`, where the scale is folded in and an adapter is added (`merging`). `write` runs the blocks that
are not on the device yet; `resume` decides whether an earlier run was the same. A disk that refuses is a StorageError;
docstrings don't repeat it.

May import: errors, sizes, layout, kernels, distributed, checkpoint, target, hub, lora.
"""
