"""Sharded models straight from and to checkpoint directories: `load_hf` and `save_hf`.

May import: everything below the converter, and the converter.
"""
