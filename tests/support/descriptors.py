"""The descriptors that this process has open."""

import os


def open_descriptors():
    return set(os.listdir("/dev/fd"))  # noqa: PTH208
