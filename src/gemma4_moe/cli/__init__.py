"""The command `gemma4-moe`: its commands and options, help texts, results as text and JSON, and exit statuses.

May import: everything.
"""
