"""The dtype in a config.json, rewritten for weights that were cast: that field alone, every other byte as it was."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.config import CONFIG_NAME, LONGEST_CONFIG
from gemma4_moe.checkpoint.storage import read_whole
from gemma4_moe.layout.dtypes import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: The field's name today, and before transformers 5.
_FIELDS = ("dtype", "torch_dtype")

#: The objects of a config that have it: the document, and the configs of its models.
_PARENTS = ((), ("text_config",), ("vision_config",), ("audio_config",))

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+', re.DOTALL)


def recast(side_files: Iterable[Path], dtype: str | None) -> dict[str, bytes]:
    """Return the config.json among side files with `dtype` in it, by its name; nothing if no weights were cast."""
    configs = [path for path in side_files if path.name == CONFIG_NAME and dtype is not None]
    return {path.name: with_dtype(read_whole(path, LONGEST_CONFIG), str(dtype)) for path in configs}


def with_dtype(raw: bytes, dtype: str) -> bytes:
    """Return the bytes of a config.json with `dtype`, torch's name, in each field that names a dtype."""
    text = raw.decode()
    written, copied = [], 0
    for start, end in _dtypes(text):
        written += [text[copied:start], json.dumps(dtype)]
        copied = end
    return "".join([*written, text[copied:]]).encode()


def _dtypes(text: str) -> list[tuple[int, int]]:
    """Return the place (start, end) of each value of a dtype's field, quotes included."""
    found = []
    path: list[str | None] = []  # the key in each open object; None in an array
    key, after_colon = None, False
    for match in _TOKEN.finditer(text):
        word = match[0]
        if word in "{[":
            path.append(key if word == "{" else None)
            key, after_colon = None, False
        elif word in "}]":
            path.pop()
            key, after_colon = None, False
        elif word == ",":
            key, after_colon = None, False
        elif word == ":":
            after_colon = True
        elif not after_colon:
            key = json.loads(word) if word.startswith('"') else None
        elif key in _FIELDS and tuple(path[1:]) in _PARENTS and word.startswith('"'):
            value = json.loads(word)
            if value.removeprefix("torch.") in BY_NAME:
                found.append(match.span())
    return found
