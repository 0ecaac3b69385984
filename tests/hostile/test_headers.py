"""Headers that lie, and the promise about all of them: what we accept, safetensors reads as the same; what it rejects,
we reject; and nothing is raised but the errors that are declared.

GEMMA4_MOE_FUZZ sets the number of mutated files that the seeded mutator makes (2,000 by default).
"""

import json
import os
import random

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.checkpoint.header import parse_header
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, TensorShapeError
from gemma4_moe.layout import dtypes
from gemma4_moe.target.file_layout import layout_header
from support.headers import entry, raw_file
from support.memory import memory_below

DECLARED = (CheckpointFormatError, DuplicateTensorError, TensorShapeError)
MUTANTS = int(os.environ.get("GEMMA4_MOE_FUZZ", "2000"))
U8 = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'


def fields(dtype='"U8"', shape="[4]", offsets="[0,4]"):
    return f'{{"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


DTYPES = ["null", "3", '"u8"', '"U4"', '""', '"BF16"', '"F4"', '"F6_E2M3"', '"U8\\u0000"']
SHAPES = [
    "null", "4", '"4"', "[4.0]", "[4e0]", "[true]", "[null]", "[-4]", "[[4]]", "[5]", "[04]", "[4,]", "[NaN]",
    "[Infinity]", "[-4,-1]", f"[{2**64 + 4}]", f"[4,{2**64 + 1}]", f"[{2**62},4,4]", "[" + "9" * 5000 + "]",
    "[4" + ",1" * 64 + "]", "[" * 100_000,
]  # fmt: skip
OFFSETS = [
    "null", "[]", "[4]", "[0,4,4]", "[-0,4]", "[0,4.0]", "[0.0,4]", "[false,4]", "[-4,0]", "[4,0]", "[4,8]", "[1,5]",
    "[0,NaN]", '["0","4"]', '{"0":0,"1":4}', "[0,5]", f"[{2**64},{2**64 + 4}]", f"[{2**64 - 4},{2**64}]", "[0,1e999]",
    f"[{2**64 - 4},{2**64 - 1}]", f"[0,{'9' * 10_000}]",
]  # fmt: skip


def ours(raw):
    """Return what our reader makes of a file, None if it refuses it."""
    try:
        return parse_header(raw, len(raw), file="f.safetensors")
    except DECLARED as error:
        message = str(error)
    assert len(message) < 20_000
    assert message.replace("\n", "").isprintable()
    return None


def theirs(raw):
    """Return what the safetensors library makes of a file, None if it refuses it."""
    try:
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return sorted((name, of["dtype"], of["shape"], bytes(of["data"])) for name, of in tensors)


def check_promise(raw):
    """Compare both readers, and return whether ours accepts the file."""
    header, tensors = ours(raw), theirs(raw)
    if header is None:
        return False
    read = sorted((e.name, e.dtype.tag, list(e.shape), raw[e.start : e.end]) for e in header.entries)
    assert read == tensors
    return True


@pytest.mark.parametrize(
    "header",
    [
        "", "null", "[]", '"x"', "{", "}", "{}}", "{} x", "{}\0", "\ufeff{}", " {}", "\n{}", "//\n{}", "{'t':{}}",
        '{"t":null}', '{"t":[]}', '{"t":3}', '{"t":{}}', '{"t":["U8",[4],[0,4]]}',
        *(fields(dtype=text) for text in DTYPES),
        *(fields(shape=text) for text in SHAPES),
        *(fields(offsets=text) for text in OFFSETS),
        f'{{"t":{{{U8},"dtype":"U8"}}}}', f'{{"t":{{{U8},"extra":[]}}}}', f'{{"t":{{{U8},"extra":{"[" * 100_000}',
        f'{{"t":{{{U8}}},"t":{{{U8}}}}}', f'{{"t":{{{U8}}},"\\u0074":{{{U8}}}}}', '{"t":{"dtype":"U8","shape":[4]}}',
        '{"t":{"dtype":"U8","data_offsets":[0,4]}}', '{"t":{"shape":[4],"data_offsets":[0,4]}}', f'{{"t":{{{U8}}}',
        f'{{"t":{{{U8}}},}}', f'{{"\\ud800":{{{U8}}}}}', f'{{"\ud800":{{{U8}}}}}', f'{{"a\nb":{{{U8}}}}}',
        f'{{"\\x41":{{{U8}}}}}', f'{{"a\x00":{{{U8}}}}}', f'{{"{"n" * 5000}":{{{U8}}}}}', f'{{t:{{{U8}}}}}',
        f'{{"t":{{{U8}}},"u":{{{U8}}}}}', f'{{"t":{{{U8}}},"u":{{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}}}',
        f'{{"__metadata__":null,"t":{{{U8}}}}}', f'{{"__metadata__":[],"t":{{{U8}}}}}',
        f'{{"__metadata__":"x","t":{{{U8}}}}}',
        f'{{"__metadata__":{{"a":1}},"t":{{{U8}}}}}', f'{{"__metadata__":{{"a":null}},"t":{{{U8}}}}}',
        f'{{"__metadata__":{{"a":{{}}}},"t":{{{U8}}}}}', f'{{"__metadata__":{{"a":"\\udfff"}},"t":{{{U8}}}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},"t":{{{U8}}}}}', f'{{"__metadata__":{{{U8}}}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{}},"t":{{{U8}}}}}', '{"":' * 100_000, "{" * 100_000, "[" * 100_000,
    ],
)  # fmt: skip
def test_each_lie_is_refused(header):
    assert ours(raw_file(header, b"abcd")) is None


@pytest.mark.parametrize(
    "header",
    [
        fields(), fields() + "  ", fields(shape="[ 2 , 2 ]"), fields(shape="[4" + ",1" * 63 + "]"),
        fields(dtype='"\\u00558"'), fields(dtype='"F4"', shape="[8]"), fields(dtype='"F8_E8M0"'),
        '{"t":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}', f'{{"":{{{U8}}},"__metadata__":{{"":"","b":"\\n"}}}}',
        f'{{"\\ud83d\\ude00\\u0000\\"\\/":{{{U8}}}}}', f'{{"a\x7f\u2028":{{{U8}}}}}',
        f'{{"e":{{"dtype":"F64","shape":[0,9],"data_offsets":[4,4]}},"t":{{{U8}}}}}',
        f'{{"z":{{"dtype":"U8","shape":[0,{2**40},{2**40}],"data_offsets":[0,0]}},"t":{{{U8}}}}}',
    ],
)  # fmt: skip
def test_odd_but_honest_headers_are_read_as_safetensors_reads_them(header):
    assert check_promise(raw_file(header, b"abcd"))


@pytest.mark.parametrize(
    "raw", [b"", b"\x02", b"\x02\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0{", b"\0" * 8]
)
def test_files_too_short_for_a_header_are_refused(raw):
    assert ours(raw) is None
    assert theirs(raw) is None


@pytest.mark.parametrize("length", [3, 100_000_001, 2**31, 2**32 + 2, 2**63, 2**64 - 8, 2**64 - 1])
def test_a_length_that_the_file_does_not_have_costs_nothing(tmp_path, length):
    with (tmp_path / "f.safetensors").open("wb") as file:
        file.write(raw_file("{}", length=length))
        if length < 2**40:
            file.truncate(10 if length == 3 else 8 + length)  # a hole: the length alone is above the format's limit
    refusal = pytest.raises(CheckpointFormatError, match="longer than the format, or the file, allows")
    with memory_below(2**20), refusal:
        SafetensorsFile(tmp_path / "f.safetensors")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit",
    [b'{"":', b"[", b'{"t":{"shape":[' + b"1," * 1000, b" ", b"\\", b'"', b'{"t":{},', b"9",
     b'{"__metadata__":{"a":"b\\u0041'],
)  # fmt: skip
def test_megabytes_of_nonsense_end_soon_and_in_little_memory(unit):
    text = b"{" + unit * (10_000_000 // len(unit))
    with memory_below(6 * len(text)):
        assert ours(raw_file(text)) is None


def _documents():
    """Honest headers of several shapes, from which the mutator starts."""
    return [
        {"t": entry("U8", [4], 0, 4)},
        {"__metadata__": {"format": "pt"}, "a.b": entry("BF16", [2, 3], 0, 12), "c": entry("F32", [], 12, 16)},
        {"x": entry("F4", [2, 5], 0, 5), "é\n": entry("F6_E2M3", [4], 5, 8), "z": entry("I64", [0, 7], 8, 8)},
        {f"layers.{n}.w": entry("F16", [n + 1, 2], 2 * n * (n + 1), 2 * (n + 1) * (n + 2)) for n in range(5)},
    ]


_TOKENS = [
    *b'{}[]":,\\ \t\n\r-.+eEu0123456789', *(bytes([byte]) for byte in (0, 0x1F, 0x7F, 0x80, 0xC0, 0xED, 0xFF)),
    b"null", b"true", b"NaN", b"1e0", b"-0", b"0.0", b"-1", b"18446744073709551615", b"18446744073709551616",
    b"4294967296",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"F4"', b'"U16"', b"\\ud800", b"\\udc00",
    b"\\u0041", b"\xef\xbb\xbf", b'"t":', b',"x":[[]]', b"[0,0]", b"[]", b"{}", b'"":', b"9" * 50,
]  # fmt: skip
_TOKENS = [bytes([token]) if isinstance(token, int) else token for token in _TOKENS]


def mutate(rng, header, data):
    """Return a file whose header was changed in one to four places, and perhaps its length or its data."""
    text = bytearray(header)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text[at:at] = rng.choice(_TOKENS)
        elif kind == 1:
            text[at : at + rng.randrange(1, 4)] = rng.choice(_TOKENS)
        elif kind == 2:
            del text[at : at + rng.choice((1, 1, 2, 5, 20))]
        elif kind == 3 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            other = rng.randrange(len(text) + 1)
            text[at:at] = text[min(at, other) : max(at, other)][:200]
        else:
            _change_a_number(rng, text)
    data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data + bytes(rng.random() < 0.1)
    length = len(text) + rng.choice((-1, 1, 8, 2**32, 2**63)) if rng.random() < 0.05 else len(text)
    return raw_file(bytes(text), data, max(0, length))


def _change_a_number(rng, text):
    digits = [at for at, byte in enumerate(text) if 0x30 <= byte <= 0x39]
    if digits:
        at = rng.choice(digits)
        text[at : at + 1] = str(rng.choice((0, 1, 2, 3, 4, 7, 8, 12, 2**63, 2**64))).encode()


def test_mutated_files_are_read_as_safetensors_reads_them_or_refused():
    rng = random.Random(20)
    seeds = [(json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(), document) for document in _documents()]
    accepted = 0
    for _ in range(MUTANTS):
        header, document = rng.choice(seeds)
        size = max(of["data_offsets"][1] for name, of in document.items() if name != "__metadata__")
        accepted += check_promise(mutate(rng, header, bytes(range(1, size + 1))))
    assert MUTANTS // 50 < accepted < MUTANTS - MUTANTS // 4


def test_bits_flipped_in_files_that_safetensors_wrote():
    rng = random.Random(21)
    whole = save(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.uint8)}, {"format": "pt"}
    )
    for _ in range(max(500, MUTANTS // 10)):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        check_promise(bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw)))) if rng.random() < 0.2 else len(raw)]))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([dtype.tag for dtype in dtypes.ALL]) | _JSON,
        "shape": st.lists(st.integers(0, 5), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | _JSON,
    }
)


@settings(max_examples=max(200, MUTANTS // 10), deadline=None)
@given(
    document=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ENTRY | _JSON, max_size=3),
    data=st.binary(max_size=40),
    ensure_ascii=st.booleans(),
)
@example(document={"a": entry("F4", [1], 0, 0)}, data=b"", ensure_ascii=True)
def test_drawn_documents_are_read_as_safetensors_reads_them_or_refused(document, data, ensure_ascii):
    check_promise(raw_file(json.dumps(document, ensure_ascii=ensure_ascii), data))


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from([d for d in dtypes.ALL if d.bits >= 8]), st.lists(st.integers(0, 40), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.just("pt"), max_size=1),
)
def test_whatever_is_laid_out_is_read_back_by_both(tensors, metadata):
    header, entries = layout_header([(n, dtype, tuple(shape)) for n, (dtype, shape) in tensors.items()], metadata)
    raw = header + random.Random(0).randbytes(entries[-1].end - len(header) if entries else 0)
    assert check_promise(raw)
    read = parse_header(raw, len(raw), file="f")
    assert read.metadata == metadata
    assert {e.name: (e.dtype, list(e.shape)) for e in read.entries} == tensors
