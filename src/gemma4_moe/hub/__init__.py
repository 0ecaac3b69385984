"""A model on the Hugging Face Hub as a source: downloaded into the Hub's cache, or read in place.

Any function that asks the Hub raises UsageError without huggingface_hub, and StorageError if it can't be reached.

May import: errors, version, sizes, layout, checkpoint, target.
"""
