"""A model on the Hugging Face Hub as a source, downloaded or read in place.

Any function that asks the Hub raises UsageError if huggingface_hub is not installed. It raises StorageError if the Hub
can't be reached, or refuses.

May import: errors, version, sizes, layout, checkpoint, target.
"""
