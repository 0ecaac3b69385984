"""A config.json, rewritten for weights that were cast or dequantised: the fields that say so, no other byte."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.layout.dtypes import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: The field's name today, and before transformers 5.
_FIELDS = ("dtype", "torch_dtype")

#: The objects of a config that have it: the document, and the configs of its models.
_PARENTS = ((), ("text_config",), ("vision_config",), ("audio_config",))

#: The fields that say that weights are quantised, and the objects of a config that have them.
QUANTISATION = ("quantization_config", "compression_config")
_MODELS = _PARENTS[:2]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+', re.DOTALL)


def rewritten(side_files: Iterable[Path], dtype: str | None, *, dequantised: bool) -> dict[str, bytes]:
    """Return the config.json among side files for weights that were cast to `dtype`, or `dequantised`, by its name."""
    configs = [path for path in side_files if path.name == CONFIG_NAME]
    return {path.name: rewritten_config(path, dtype, dequantised=dequantised) for path in configs}


def rewritten_config(config: Path, dtype: str | None, *, dequantised: bool) -> bytes:
    """Return the bytes of a config.json for weights that were cast to `dtype`, or `dequantised`."""
    raw = read_whole(config, LONGEST_CONFIG)
    raw = without_quantisation(raw) if dequantised else raw
    return raw if dtype is None else with_dtype(raw, dtype)


def without_quantisation(raw: bytes) -> bytes:
    """Return the bytes of a config.json without the fields that say that weights are quantised."""
    text = raw.decode()
    found = [member for member in _members(text) if member.key in QUANTISATION and member.path in _MODELS]
    for member in sorted(found, key=lambda member: member.start, reverse=True):
        before, after = text[: member.start].rstrip(), text[member.end :]
        text = before[:-1] + after if before.endswith(",") else before + after.lstrip().removeprefix(",")
    return text.encode()


def with_dtype(raw: bytes, dtype: str) -> bytes:
    """Return the bytes of a config.json with `dtype`, torch's name, in each field that names a dtype."""
    text = raw.decode()
    written, copied = [], 0
    for member in _members(text):
        if member.key in _FIELDS and member.path in _PARENTS and _is_dtype(text[member.value : member.end]):
            written += [text[copied : member.value], json.dumps(dtype)]
            copied = member.end
    return "".join([*written, text[copied:]]).encode()


def _is_dtype(value: str) -> bool:
    return value.startswith('"') and json.loads(value).removeprefix("torch.") in BY_NAME


class _Member(NamedTuple):
    """A member of an object: the keys of the objects that it is in, its key, and where key, value and member are."""

    path: tuple[str | None, ...]
    key: str
    start: int
    value: int
    end: int


def _members(text: str) -> Iterator[_Member]:
    """Yield the members of all objects of a JSON text, each when it ends. The key of an array is None in a path."""
    opened: list[tuple[tuple[str | None, ...], str | None, int, int]] = []  # as in a _Member, for each open value
    path: tuple[str | None, ...] = ()
    key, start, after_colon = None, 0, False
    for match in _TOKEN.finditer(text):
        word = match[0]
        if word in "{[":
            opened.append((path, key, start, match.start()))
            path = (*path, key if word == "{" else None) if len(opened) > 1 else ()
            key, after_colon = None, False
        elif word in "}]":
            path, key, start, value = opened.pop()
            if key is not None:
                yield _Member(path, key, start, value, match.end())
            key, after_colon = None, False
        elif word == ",":
            key, after_colon = None, False
        elif word == ":":
            after_colon = True
        elif not after_colon:
            key, start = (json.loads(word), match.start()) if word.startswith('"') else (None, 0)
        elif key is not None:
            yield _Member(path, key, start, match.start(), match.end())
