"""Progress of a download, taken from the bars that the Hub's client would show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def bar_that_checks(check: Callable[[], object]) -> Any:
    """Return a class for the client's bars, with which a download ends once `check` raises an error."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> None:
            check()
            super().update(n)

    return Bar


def bar_that_tells(told: Callable[[int], object], check: Callable[[], object]) -> Any:
    """Return a class for the client's bars that shows nothing, and calls `told` with the bytes that have come.

    The client has several bars in bytes, such as one of the bytes that the network brought and one of those that are
    on the disk. The bar that is ahead counts. A download ends once `check` raises an error.
    """
    from tqdm import tqdm  # the Hub's client brings it

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *given: Any, **more: Any) -> None:
            more.pop("name", None)  # that of the client's own class
            self._bytes = 0 if more.get("unit") == "B" else None
            super().__init__(*given, **more | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            check()
            if self._bytes is not None:
                self._bytes += int(n or 0)
                if self._bytes > furthest:
                    told(self._bytes - furthest)
                    furthest = self._bytes

    return Bar
