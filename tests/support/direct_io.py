"""Whether direct I/O works here, and calls of the system that fail: at once, or after a while."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def works_here(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def failing_after(calls: int, code: int, whole: Callable[..., int]) -> Callable[..., int]:
    seen: list[Any] = []

    def call(*arguments: Any) -> int:
        seen.append(arguments)
        if len(seen) == calls + 1:
            raise OSError(code, os.strerror(code))
        return whole(*arguments)

    return call


def refusing(code: int) -> Callable[..., Any]:
    """Return a system call that always fails with this errno."""

    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call
