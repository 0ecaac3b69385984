"""Safetensors files made by hand, so that any rule of the format can be broken."""

from __future__ import annotations

import json
import struct
from typing import Any


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header: str | bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file of this header and data; `length` is the length it claims, its true one by default."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if length is None else length) + header + data
