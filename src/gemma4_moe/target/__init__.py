"""A directory that is absent or complete: the files that a conversion or a save writes, and how they are published.

May import: errors, sizes, layout, distributed, checkpoint.
"""
