"""Sharded models straight from and to checkpoint directories, and a preview of the memory that a mesh will need.

May import: everything below the converter, and the converter.
"""
