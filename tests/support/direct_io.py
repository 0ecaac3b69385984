"""Whether direct I/O works here, and calls of the system that fail: at once, or after a while."""

import os


def works_here(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def failing_after(calls, code, whole):
    seen = []

    def call(*arguments):
        seen.append(arguments)
        if len(seen) == calls + 1:
            raise OSError(code, os.strerror(code))
        return whole(*arguments)

    return call


def refusing(code):
    """Return a system call that always fails with this errno."""

    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call
