"""A watch over waits for the device."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_synchronisation():
    """Make each wait for the device an error. Torch warns, once a process, that its mode for this is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
