"""Fault points of our own: every call that changes the disk is counted, and one of them is made to fail.

Nothing has to be installed, and nothing in the package knows of it: the calls are replaced in the module `os`.
"""

import errno
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass

from crash.sizes import shrink
from gemma4_moe.converter import convert
from gemma4_moe.target import transaction

CALLS = ("pwrite", "fsync", "ftruncate", "mkdir", "unlink", "rename", "rmdir")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["gemma4_moe.converter.convert", "gemma4_moe.kernels._cpu", "ml_dtypes"])


@dataclass(frozen=True)
class Fault:
    """What happens at the call number `at`, counted from 0: kill, tear (half a write, then kill), term, or an errno."""

    at: int
    kind: str


class Points:
    """Counts the calls, and lets the fault happen."""

    def __init__(self, fault):
        self.fault = fault
        self.seen: list[str] = []
        self.lock = threading.Lock()

    def install(self):
        for name in CALLS:
            setattr(os, name, self.watched(name, getattr(os, name)))
        transaction.exchange = self.watched("exchange", transaction.exchange)

    def watched(self, name, call):
        def watch(*arguments, **more):
            with self.lock:
                number = len(self.seen)
                self.seen.append(name)
            if number == self.fault.at:
                self.fail(name, call, arguments)
            return call(*arguments, **more)

        return watch

    def fail(self, name, call, arguments):
        if self.fault.kind == "tear" and name == "pwrite":
            descriptor, content, offset = arguments
            call(descriptor, bytes(content[: len(content) // 2]), offset)
        if self.fault.kind in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            code = getattr(errno, self.fault.kind)
            raise OSError(code, os.strerror(code))


def _convert(source, target, options, fault, results):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shrink()
    points = Points(fault)
    points.install()
    try:
        convert.convert(source, target, **options)
        results.put(points.seen)
    except (OSError, KeyboardInterrupt) as error:
        results.put(repr(error))


def convert_with(case, fault):
    """Convert in a process of its own. Return the calls that it made, what it raised, or None where it was killed."""
    results = _CONTEXT.SimpleQueue()
    process = _CONTEXT.Process(target=_convert, args=(case.source, case.target, case.options, fault, results))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, process.exitcode
    return results.get()
