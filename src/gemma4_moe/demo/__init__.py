"""`gemma4-moe demo`: a small random model taken through both conversions, verified, and its logits compared.

May import: errors, sizes, layout, kernels, converter, verifier.
"""
