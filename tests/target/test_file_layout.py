import json
import random
import struct
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.numpy import load

from gemma4_moe.checkpoint.header import parse_header
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, TensorShapeError
from gemma4_moe.layout import dtypes
from gemma4_moe.layout.dtypes import BFLOAT16, FLOAT32
from gemma4_moe.target.file_layout import layout_header

TENSORS = [
    ("odd.a", BFLOAT16, (7,)),
    ("small.page", BFLOAT16, (2048,)),
    ("odd.fp32", FLOAT32, (3, 5)),
    ("large.page", FLOAT32, (3, 1024)),
    ("bytes", dtypes.BY_TAG["U8"], (5,)),
    ("odd.b", BFLOAT16, (7,)),
    ("large.odd", BFLOAT16, (3, 1031)),
    ("empty", BFLOAT16, (0, 3)),
    ("doubles", dtypes.BY_TAG["F64"], (1,)),
]


def test_whole_pages_come_first_then_falling_element_sizes_then_sizes_then_names():
    _, entries = layout_header(TENSORS)
    assert [entry.name for entry in entries] == [
        "large.page", "small.page", "empty", "doubles", "odd.fp32", "large.odd", "odd.a", "odd.b", "bytes"
    ]  # fmt: skip


def test_data_starts_at_a_page_and_every_tensor_at_its_element():
    header, entries = layout_header(TENSORS, {"format": "pt"})
    assert len(header) % 4096 == 0
    assert entries[0].start == len(header)
    for before, entry in pairwise(entries):
        assert entry.start == before.end
    for entry in entries:
        assert entry.start % (4096 if entry.nbytes % 4096 == 0 else entry.dtype.bits // 8) == 0


def test_the_bytes_depend_on_the_tensors_alone():
    expected = layout_header(TENSORS, {"a": "1", "b": "2"})
    for tensors in (TENSORS[::-1], random.Random(0).sample(TENSORS, len(TENSORS))):
        assert layout_header(tensors, {"b": "2", "a": "1"}) == expected


def test_the_format_is_eight_bytes_of_length_json_and_spaces():
    header, _ = layout_header([("t", BFLOAT16, (2, 3))], {"format": "pt"})
    (length,) = struct.unpack("<Q", header[:8])
    text = header[8:].decode()
    assert length == len(text) == 4088
    assert (
        text.rstrip(" ") == '{"__metadata__":{"format":"pt"},"t":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    )


def test_safetensors_reads_what_is_laid_out(tmp_path):
    rng = np.random.default_rng(1)
    header, entries = layout_header(TENSORS, {"format": "pt"})
    data = rng.bytes(entries[-1].end - len(header))
    (tmp_path / "model.safetensors").write_bytes(header + data)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert len(loaded) == len(TENSORS)
    for name, dtype, shape in TENSORS:
        (entry,) = (entry for entry in entries if entry.name == name)
        here = data[entry.start - len(header) : entry.end - len(header)]
        assert loaded[name].dtype is getattr(torch, dtype.name)
        assert tuple(loaded[name].shape) == shape
        assert loaded[name].reshape(-1).view(torch.uint8).numpy().tobytes() == here
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_layout_reads_back_as_itself():
    names = ['quote " \\', "é 漢 𐀀", "line\nbreak", "\x00", "\u2028", ""]
    header, entries = layout_header([(name, FLOAT32, (number + 1,)) for number, name in enumerate(names)])
    raw = header + bytes(entries[-1].end - len(header))
    read = parse_header(raw, len(raw), file="f")
    assert read.entries == entries
    assert read.metadata == {}
    assert sorted(load(raw)) == sorted(names)


def test_no_tensors_make_a_file_too():
    header, entries = layout_header([])
    assert entries == ()
    assert safetensors.deserialize(header) == []
    assert json.loads(header[8:]) == {}


def test_names_that_can_not_be_written_are_refused():
    for name, sentence in (("__metadata__", "keeps for itself"), ("a\ud800", "not Unicode text")):
        with pytest.raises(CheckpointFormatError, match=sentence):
            layout_header([(name, BFLOAT16, (1,))], {"format": "pt"})
    with pytest.raises(DuplicateTensorError):
        layout_header([("a", BFLOAT16, (1,)), ("a", FLOAT32, (2,))])
    with pytest.raises(TensorShapeError):
        layout_header([("a", dtypes.BY_TAG["F4"], (3,))])


def test_a_header_above_the_formats_limit_is_refused(monkeypatch):
    monkeypatch.setattr("gemma4_moe.target.file_layout.LONGEST_HEADER", 4087)
    with pytest.raises(CheckpointFormatError, match="more tensors than"):
        layout_header([("a", BFLOAT16, (1,))])
