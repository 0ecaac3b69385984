"""A scanner for the little JSON that headers and indexes are made of, by the rules of RFC 8259 and nothing looser.

Python's json takes NaN, keeps the last of two equal keys, lets lone surrogates through, raises ValueError on long
integers, and builds whatever a document asks for before anyone can object. Here the caller asks for each token, so that
the first one that doesn't belong ends the reading: memory stays proportional to what the format allows, and no depth
of nesting reaches the stack.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NoReturn

from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The largest integer of the format, which counts in unsigned 64-bit numbers.
LARGEST_INTEGER = 2**64 - 1

#: The longest key, in characters. Far above any real name, and short enough to stand in a message.
LONGEST_NAME = 4096

#: How many brackets may be open in a value that is skipped, and how many values it may hold.
DEEPEST_NESTING = 64
MOST_SKIPPED = 10_000

# Each token takes the white space after it along.
_SPACE = r"[ \t\n\r]*+"
_STRING = re.compile(r'("(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+")' + _SPACE)
_UNSIGNED = re.compile(r"(0|[1-9][0-9]{0,19})(?![0-9.eE])" + _SPACE)
_SCALAR = re.compile(r"(?:true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)" + _SPACE)
_PUNCTUATION = {char: re.compile(re.escape(char) + _SPACE) for char in "{}[]:,"}
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

_DAMAGED = "the file is damaged, or not what its name says: get it again"


class JsonScanner:
    """Reads one JSON document, token by token.

    Attributes:
        file: What errors call the document's file.
    """

    def __init__(self, raw: bytes, *, file: object, what: str) -> None:
        """Decode `raw`; `what` names the document in messages, e.g. "header".

        Raises:
            CheckpointFormatError: It is not UTF-8.
        """
        self.file = file
        self._what = what
        self._at = 0
        try:
            self._text = raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointFormatError(
                f"the {what} is not UTF-8", file=file, expected="UTF-8", found=str(error), hint=_DAMAGED
            ) from error

    def fail(self, expected: str) -> NoReturn:
        """Raise a CheckpointFormatError that says what was expected at this place and shows what stands there."""
        found = self._text[self._at : self._at + 40] or "the end"
        raise CheckpointFormatError(
            f"the {self._what} is not the JSON that the format asks for, at character {self._at}",
            file=self.file,
            expected=expected,
            found=found,
            hint=_DAMAGED,
        )

    def starts_with(self, char: str) -> bool:
        """Say whether `char` comes next."""
        return self._text.startswith(char, self._at)

    def take(self, char: str) -> None:
        """Read one of `{}[]:,`."""
        if not self.try_take(char):
            self.fail(char)

    def try_take(self, char: str) -> bool:
        """Read one of `{}[]:,` if it comes next, and say whether it did."""
        match = _PUNCTUATION[char].match(self._text, self._at)
        if match is None:
            return False
        self._at = match.end()
        return True

    def string(self) -> str:
        """Read a string."""
        match = _STRING.match(self._text, self._at)
        if match is None:
            self.fail("a string")
        quoted: str = match[1]
        value = quoted[1:-1]
        if "\\" in value:
            value = str(json.loads(quoted))
            if _LONE_SURROGATE.search(value):
                self.fail("a string of Unicode characters, without lone surrogates")
        self._at = match.end()
        return value

    def name(self) -> str:
        """Read a string of at most `LONGEST_NAME` characters."""
        start = self._at
        value = self.string()
        if len(value) > LONGEST_NAME:
            self._at = start
            self.fail(f"a name of at most {LONGEST_NAME} characters")
        return value

    def unsigned(self) -> int:
        """Read an integer between 0 and 2^64 - 1, without sign, fraction or exponent."""
        match = _UNSIGNED.match(self._text, self._at)
        if match is None or (value := int(match[1])) > LARGEST_INTEGER:
            self.fail("an integer from 0 to 2^64 - 1")
        self._at = match.end()
        return value

    def members(self) -> Iterator[str]:
        """Read an object. For each key that is yielded, the caller reads the value."""
        self.take("{")
        if self.try_take("}"):
            return
        while True:
            key = self.name()
            self.take(":")
            yield key
            if not self.try_take(","):
                break
        self.take("}")

    def unsigned_list(self, longest: int) -> tuple[int, ...]:
        """Read an array of at most `longest` unsigned integers."""
        values: list[int] = []
        self.take("[")
        if self.try_take("]"):
            return ()
        while True:
            values.append(self.unsigned())
            if len(values) > longest:
                self.fail(f"at most {longest} integers")
            if not self.try_take(","):
                break
        self.take("]")
        return tuple(values)

    def skip_value(self) -> None:
        """Read a value of at most `DEEPEST_NESTING` levels and `MOST_SKIPPED` values, and forget it."""
        closers: list[str] = []
        for _ in range(MOST_SKIPPED):
            if self.starts_with("{") or self.starts_with("["):
                self._open(closers)
                if not self.starts_with(closers[-1]):
                    self._skip_key(closers)
                    continue
            elif self.starts_with('"'):
                self.string()
            else:
                self._skip_scalar()
            while closers and self.try_take(closers[-1]):
                closers.pop()
            if not closers:
                return
            self.take(",")
            self._skip_key(closers)
        self.fail(f"at most {MOST_SKIPPED} values")

    def end(self) -> None:
        """Check that nothing but white space is left."""
        if self._at != len(self._text):
            self.fail("the end")

    def _open(self, closers: list[str]) -> None:
        if len(closers) == DEEPEST_NESTING:
            self.fail(f"at most {DEEPEST_NESTING} nested values")
        opener = self._text[self._at]
        self.take(opener)
        closers.append("}" if opener == "{" else "]")

    def _skip_key(self, closers: list[str]) -> None:
        if closers[-1] == "}":
            self.string()
            self.take(":")

    def _skip_scalar(self) -> None:
        match = _SCALAR.match(self._text, self._at)
        if match is None:
            self.fail("a value")
        self._at = match.end()
