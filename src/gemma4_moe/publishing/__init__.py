"""A model out of a training run as others use it: converted to hf, completed, verified, and pushed to the Hub.

May import: errors, sizes, layout, kernels, distributed, checkpoint, target, hub, converter, verifier.
"""
