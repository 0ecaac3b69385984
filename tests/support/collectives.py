"""Counts the collectives that a program calls."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts those that are called inside of the `with` block, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))
