"""A model on the Hugging Face Hub as a source: downloaded into the Hub's cache, or read in place.

May import: errors, version, sizes, layout, checkpoint, target.
"""
