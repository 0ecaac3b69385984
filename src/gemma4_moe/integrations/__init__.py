"""Hooks into other frameworks, one module each; importing this package imports none of them.

May import: errors, sizes, layout, kernels, distributed, adapter.
"""
