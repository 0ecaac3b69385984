"""Checkpoints on disk: safetensors files read strictly and written at offsets, their directories, config and index.

Nothing here imports torch, maps a file into memory or executes what it reads.
"""
