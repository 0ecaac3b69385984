"""Sizes in bytes as people write and read them: 5GB is 5·10⁹ bytes, 1GiB is 2³⁰."""

from __future__ import annotations

import re
from collections.abc import Callable

from gemma4_moe.errors import UsageError

#: Called with the bytes that are done so far and with their total.
Progress = Callable[[int, int], object]

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("", 1000), ("B", 1000), ("iB", 1024))
}
#: More than any disk has, and small enough for a float and for 64 bits.
_MOST = 2.0**50
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: int | str) -> int:
    """Return a size in bytes from a number of bytes, or from text such as "5GB", "1.5 GiB" or "4096".

    Raises:
        UsageError: The text is not a size, or the size is not positive.
    """
    if isinstance(size, int):
        amount = size
    else:
        match = _SIZE.fullmatch(size)
        units = {unit.upper(): factor for unit, factor in _UNITS.items()}
        if match is None or match[2].upper() not in units:
            expected = "a number and a unit, such as 5GB or 512MiB"
            hint = f"write it with one of {', '.join(filter(None, _UNITS))}, or as a number of bytes"
            raise UsageError("not a size", expected=expected, found=repr(size), hint=hint)
        amount = int(min(float(match[1]), _MOST) * units[match[2].upper()])
    if amount < 1:
        hint = "give a larger size"
        raise UsageError("a size must be positive", expected="at least 1 byte", found=repr(size), hint=hint)
    return amount


def exact_size(amount: int) -> str:
    """Return a size as text that `parse_size` reads as the same number: "5GB", "512MiB" or "4097"."""
    fitting = [(factor, unit) for unit, factor in _UNITS.items() if unit.endswith("B") and amount % factor == 0]
    factor, unit = max(fitting)
    return f"{amount // factor}{unit}" if factor > 1 else str(amount)


def format_size(amount: int) -> str:
    """Return a size as text for people: "51.61 GB", or "812 B"."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if amount >= factor:
            return f"{amount / factor:.2f} {unit}"
    return f"{amount} B"
