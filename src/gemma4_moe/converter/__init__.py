"""Checkpoints on disk between the two layouts: `convert`, `plan` and `inspect`. No model is built, no torch is loaded.

A plan is made from headers (`plan`), cut into blocks of experts (`blocks`), and each block is read, converted, hashed
and written (`steps`, `write`). What touches the disk raises StorageError if it refuses; docstrings don't repeat it.

May import: errors, sizes, layout, kernels, distributed, checkpoint, target, hub.
"""
