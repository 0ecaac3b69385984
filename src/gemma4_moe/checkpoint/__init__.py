"""A checkpoint directory, read: its safetensors files, index, config, side files and form.

Nothing here imports torch, maps a file into memory or executes anything that was read. Any function that looks at the
disk raises StorageError if the disk or its permissions refuse.

May import: errors, sizes, layout.
"""
