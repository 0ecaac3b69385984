"""`gemma4-moe demo`: a small random model converted both ways and verified, and its logits compared.

May import: errors, sizes, layout, kernels, converter, verifier.
"""
