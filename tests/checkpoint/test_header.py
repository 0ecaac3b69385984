import hashlib

import pytest
import safetensors

from gemma4_moe.checkpoint.header import parse_header, tensor_nbytes
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, TensorShapeError
from gemma4_moe.layout import dtypes
from support.headers import entry, raw_file


def parse(raw):
    return parse_header(raw, len(raw), file="f.safetensors")


def test_entries_come_in_the_order_of_their_data_with_absolute_offsets():
    header = {
        "later": entry("F32", [2, 3], 6, 30),
        "__metadata__": {"format": "pt", "note": "ä"},
        "first": entry("BF16", [3], 0, 6),
    }
    raw = raw_file(header, bytes(30))
    read = parse(raw)
    start = len(raw) - 30
    assert [(e.name, e.dtype.name, e.shape, e.start, e.end, e.nbytes) for e in read.entries] == [
        ("first", "bfloat16", (3,), start, start + 6, 6),
        ("later", "float32", (2, 3), start + 6, start + 30, 24),
    ]
    assert read.metadata == {"format": "pt", "note": "ä"}
    assert read.data_start == start
    assert read.digest == hashlib.sha256(raw[:start]).hexdigest()


@pytest.mark.parametrize("header", [{}, {"__metadata__": {}}, {"scalar": entry("U8", [], 0, 1)}])
def test_files_without_tensors_and_tensors_without_axes_are_fine(header):
    data = bytes(1) if "scalar" in header else b""
    assert len(parse(raw_file(header, data)).entries) == len(safetensors.deserialize(raw_file(header, data)))


def test_empty_tensors_may_share_an_offset():
    header = {"a": entry("F32", [2, 0], 4, 4), "b": entry("F32", [1], 0, 4), "c": entry("F32", [0], 0, 0)}
    assert [e.name for e in parse(raw_file(header, bytes(4))).entries] == ["c", "b", "a"]


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda dtype: dtype.tag)
def test_every_dtype_of_the_format_has_the_size_that_safetensors_gives_it(dtype):
    nbytes = 4 * dtype.bits // 8
    raw = raw_file({"t": entry(dtype.tag, [2, 2], 0, nbytes)}, bytes(nbytes))
    assert parse(raw).entries[0].dtype is dtype
    assert safetensors.deserialize(raw)[0][1]["dtype"] == dtype.tag


@pytest.mark.parametrize(
    ("tag", "shape"), [("F4", [3]), ("F6_E2M3", [2]), ("F6_E3M2", [3, 5]), ("U8", [2**32, 2**32]), ("F32", [2**63])]
)
def test_shapes_that_fill_no_whole_bytes_or_leave_64_bits_are_refused(tag, shape):
    with pytest.raises(TensorShapeError):
        tensor_nbytes("t", dtypes.BY_TAG[tag], tuple(shape))


def test_a_product_that_leaves_64_bits_on_the_way_to_zero_is_refused_as_safetensors_does():
    raw = raw_file({"t": entry("U8", [2**32, 2**32, 0], 0, 0)})
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(raw)
    with pytest.raises(TensorShapeError, match="64 bits"):
        parse(raw)


@pytest.mark.parametrize(
    ("header", "expected", "found"),
    [
        ({"t": entry("F32", [2, 3], 0, 12)}, "24 bytes for F32 [2, 3]", "12 bytes at [0, 12)"),
        ({"t": entry("F32", [3], 12, 0)}, "12 bytes for F32 [3]", "-12 bytes at [12, 0)"),
    ],
)
def test_a_size_that_is_not_the_shapes_is_an_error_that_names_both(header, expected, found):
    with pytest.raises(TensorShapeError) as caught:
        parse(raw_file(header, bytes(12)))
    assert caught.value.facts == {"tensor": "t", "file": "f.safetensors", "expected": expected, "found": found}


def test_holes_overlaps_tails_and_cuts_each_have_their_sentence():
    two = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}
    hole = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}
    overlap = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}
    for header, size, sentence in (
        (hole, 9, "a hole before a tensor's data"),
        (overlap, 7, "two tensors share bytes"),
        (two, 9, "bytes after the last tensor"),
        (two, 7, "the file is cut off"),
    ):
        with pytest.raises(CheckpointFormatError, match=sentence):
            parse(raw_file(header, bytes(size)))
    assert len(parse(raw_file(two, bytes(8))).entries) == 2


def test_one_name_twice_is_refused_however_it_is_spelled():
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for other in ('"ab"', r'"\u0061b"'):
        with pytest.raises(DuplicateTensorError) as caught:
            parse(raw_file(f'{{"ab":{one},{other}:{one}}}'))
        assert caught.value.facts["tensor"] == "ab"
