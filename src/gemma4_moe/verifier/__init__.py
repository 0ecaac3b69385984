"""`verify` and `diff`: two checkpoints compared bit by bit, with a reference that shares no code with the converter.

May import: errors, sizes, layout, checkpoint, target.
"""
