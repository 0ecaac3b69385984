"""The command `gemma4-moe`: its options, its tables, its progress bar and its exit statuses.

May import: everything.
"""
