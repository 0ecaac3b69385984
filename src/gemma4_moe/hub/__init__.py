"""A model on the Hugging Face Hub as a source: fetched into the Hub's cache, or read in place.

May import: errors, sizes, layout, checkpoint.
"""
