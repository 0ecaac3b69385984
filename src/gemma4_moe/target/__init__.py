"""A directory that is absent or complete: the files that a conversion or a save writes, and how they are published.

Whatever touches the disk raises StorageError if the disk or its permissions refuse; docstrings don't repeat it.

May import: errors, sizes, layout, distributed, checkpoint.
"""
