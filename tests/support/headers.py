"""Safetensors files made by hand, so that any rule of the format can be broken."""

import json
import struct


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(header, data=b"", length=None):
    """Return a file of this header and data; `length` is the length it claims, its true one by default."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if length is None else length) + header + data
