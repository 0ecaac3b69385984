"""JSON of headers and indexes, read by the rules of RFC 8259, and none looser.

Python's json takes NaN, keeps the last of two equal keys, lets lone surrogates pass and turns -0 into 0. Here NaN and
surrogates are errors, -0 is no integer, and an object is a tuple of its (key, value) pairs, equal keys included.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The largest integer of the format, which counts in unsigned 64-bit numbers.
LARGEST_INTEGER = 2**64 - 1

#: The longest name of a tensor or of a file, in characters. Far above any real name, and short enough for a message.
LONGEST_NAME = 4096

# A document may have `_FEW` commas and brackets, and one more for every `_LENGTH_OF_ONE` characters. Honest headers and
# indexes need fewer, and the memory for the values stays in proportion to the document.
_FEW = 10_000
_LENGTH_OF_ONE = 5

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_DAMAGED = "the file is damaged, or not what its name says: get it again"


def load_object(raw: bytes, *, file: object, what: str) -> tuple[tuple[str, Any], ...]:
    """Return the (key, value) pairs of a JSON document that is an object.

    In it, an object is a tuple of pairs too, and an array a list. Integers of more than 20 digits are floats. Errors
    name the document by `what`, e.g. "header".

    Raises:
        CheckpointFormatError: It is not such a document.
    """
    try:
        text = raw.decode()
        _check_text(text)
        members: tuple[tuple[str, Any], ...] = json.loads(
            text, object_pairs_hook=tuple, parse_int=_integer, parse_constant=_refuse_constant
        )
        if _SURROGATE.search(text):
            json.dumps(members, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        problem = f"the {what} is not {'UTF-8' if isinstance(error, UnicodeDecodeError) else 'strict JSON'}"
        expected = "one JSON object in UTF-8"
        raise CheckpointFormatError(problem, file=file, expected=expected, found=error, hint=_DAMAGED) from error
    return members


def repeated_key(members: Iterable[tuple[str, Any]]) -> str | None:
    """Return the first key that an object has twice, or None."""
    seen: set[str] = set()
    for key, _ in members:
        if key in seen:
            return key
        seen.add(key)
    return None


def check_name(name: str, *, file: object) -> None:
    """Raise a CheckpointFormatError if a tensor's or file's name is longer than `LONGEST_NAME`."""
    if len(name) > LONGEST_NAME:
        expected, found = f"at most {LONGEST_NAME} characters", f"{len(name)} characters, {reprlib.repr(name)}"
        raise CheckpointFormatError("a name that is too long", file=file, expected=expected, found=found, hint=_DAMAGED)


def is_unsigned(value: object) -> bool:
    """Return whether a value is an integer from 0 to `LARGEST_INTEGER`. True and false are none."""
    return type(value) is int and 0 <= value <= LARGEST_INTEGER


def _check_text(text: str) -> None:
    if not text.startswith("{"):
        raise json.JSONDecodeError("Expecting '{'", text, 0)
    most = _FEW + len(text) // _LENGTH_OF_ONE
    count = text.count(",") + text.count("[") + text.count("{")
    if count > most:
        raise ValueError(f"more than {most} commas and brackets in {len(text)} characters")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 20 and digits != "-0" else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
