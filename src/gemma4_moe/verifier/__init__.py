"""`verify` and `diff`: checkpoints compared bit by bit, by arithmetic that shares no code with the converter.

`expected` says which tensors a target should have, `arithmetic` which bits, and `comparison` reads both sides. The
results are `comparison.Verification` and `differences.Difference`.

May import: errors, sizes, layout, checkpoint, target, hub. Never kernels, converter or adapter, which it judges.
"""
