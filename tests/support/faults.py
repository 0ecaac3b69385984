"""Consumers of a pass that fail on purpose, and states that a sender can't read."""

import os
import time

from support.streams import raw

#: How long each side of a transport waits in tests, in seconds.
LIMIT = 1.0

#: Tensors of the small model of three layers, and the points of a pass at which a consumer fails.
TENSORS = 25
PLACES = {"before the first": 0, "in the middle": TENSORS // 2, "at the last": TENSORS, "after the last": TENSORS + 1}


def described(pairs):
    """Names, dtypes, shapes and bytes."""
    return [(name, str(tensor.dtype), tuple(tensor.shape), raw(tensor)) for name, tensor in pairs]


def misbehave(fault):
    if fault == "raises":
        raise ValueError("the engine is full")
    if fault == "sleeps":
        time.sleep(2 * LIMIT)
    elif fault == "dies":
        os._exit(0)


def consume(tensors, fault=None, at=None):
    """Read a pass, and misbehave once `at` tensors are read; `TENSORS` + 1 is after the loop."""
    found = []
    if at == 0:
        time.sleep(LIMIT / 2)  # the sender has come: it would drop a pass that failed before
        misbehave(fault)
    for name, tensor in tensors:
        found += described([(name, tensor)])
        if len(found) == at:
            if fault == "stops":
                return None
            misbehave(fault)
    if at == TENSORS + 1:
        misbehave(fault)
    return found


class State(list):
    """Mappings, one of which can't be read while `broken`."""

    broken = None

    def __iter__(self):
        for number, mapping in enumerate(super().__iter__()):
            if self.broken == "raises" and number == 1:
                raise LookupError("no such page")
            if self.broken == "dies" and number == 1:
                os._exit(0)
            yield mapping


def layered(nemo):
    """A state of a mapping for each layer."""
    parts = {}
    for name, tensor in nemo.items():
        parts.setdefault(name.partition(".layers.")[2][:2], {})[name] = tensor
    return State(parts.values())
