import json

import pytest

from gemma4_moe.checkpoint.strict_json import (
    LARGEST_INTEGER,
    LONGEST_NAME,
    check_name,
    is_unsigned,
    load_object,
    repeated_key,
)
from gemma4_moe.errors import CheckpointFormatError
from support.memory import memory_below


def load(text):
    return load_object(text.encode() if isinstance(text, str) else text, file="f", what="document")


@pytest.mark.parametrize(
    "value", ["", "a", 'quote " and \\', "tab\tand newline\n", "é 漢 𐀀 \\ud800", "\x00\x1f\x7f", "/"]
)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_a_string_is_what_json_wrote(value, ensure_ascii):
    assert load(json.dumps({value: value}, ensure_ascii=ensure_ascii) + " \t\r\n") == ((value, value),)


def test_objects_are_pairs_in_their_order_and_arrays_are_lists():
    assert load('{"b":[1,{"c":{}}],"a" : true,"b":null}') == (("b", [1, (("c", ()),)]), ("a", True), ("b", None))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '"a"', " {}", "\ufeff{}", "{} x", "{}{}", "{", '{"a"}', '{"a":1', '{"a":1,}', "{,}", '{"a":1 "b":2}',
        "{1:1}", "{'a':1}", '{"a":"\n"}', r'{"a":"\x41"}', r'{"a":"\u12g4"}', r'{"a":"\ud800"}', r'{"\uDFFF":1}',
        r'{"a":["\udc00\ud800"]}', '{"a":NaN}', '{"a":-Infinity}', '{"a":01}', '{"a":1.}', '{"a":+1}', '{"a":\u0663}',
        "{" + '"a":[' * 100_000, '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(text):
    with pytest.raises(CheckpointFormatError, match="the document is not strict JSON") as caught:
        load(text)
    assert caught.value.facts["file"] == "f"
    assert len(caught.value.facts["found"]) < 200


@pytest.mark.parametrize("raw", [b'{"\xff":1}', b'{"\xc0\x80":1}', b'{"\xed\xa0\x80":1}'])
def test_bytes_that_are_not_utf8_are_refused(raw):
    with pytest.raises(CheckpointFormatError, match="the document is not UTF-8"):
        load(raw)


@pytest.mark.parametrize("text", ["0", "7", str(2**53 + 1), str(2**64 - 1)])
def test_an_unsigned_integer(text):
    ((_, value),) = load(f'{{"a":{text}}}')
    assert str(value) == text
    assert is_unsigned(value)


NOT_UNSIGNED = ["-0", "-1", "0.0", "1e2", "true", "false", "null", '"1"', "[1]", str(2**64), "9" * 21]
MILLIONS_OF_DIGITS = [sign + "9" * 5_000_000 for sign in ("", "-", "0.", "1e")]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [*NOT_UNSIGNED, *MILLIONS_OF_DIGITS])
def test_what_is_no_unsigned_integer_however_long(text):
    ((_, value),) = load(f'{{"a":{text}}}')
    assert not is_unsigned(value)


def test_the_first_key_that_is_there_twice():
    assert repeated_key(load_object(b'{"a":1,"b":2,"c":3,"\\u0062":4,"a":5}', file="f", what="document")) == "b"
    assert repeated_key((("a", 1), ("b", 1))) is None


def test_a_name_is_bounded_and_its_error_short():
    check_name("n" * LONGEST_NAME, file="f")
    with pytest.raises(CheckpointFormatError, match="too long") as caught:
        check_name("n" * (LONGEST_NAME + 1), file="f")
    assert "4097" in caught.value.facts["found"]
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", ["{},", "[],", '"",', "1,", '"":1,', '[{"":[', "[1],       ", '{"":0},       ', "1.5, "]
)
def test_the_memory_stays_in_proportion_to_the_document(unit):
    text = '{"":[' + unit * (2_000_000 // len(unit))
    with memory_below(20 * len(text)), pytest.raises(CheckpointFormatError):
        load(text)


def test_the_densest_honest_documents_are_not_refused():
    entry = {"dtype": "U8", "shape": [1] * 6, "data_offsets": [0, LARGEST_INTEGER]}
    text = json.dumps({f"{n:x}": entry for n in range(10_000)}, separators=(",", ":"))
    assert len(load(text)) == 10_000
    axes = {"dtype": "U8", "shape": [1] * 64, "data_offsets": [0, 1]}
    assert len(load(json.dumps({f"{n:x}": axes for n in range(100)}, separators=(",", ":")))) == 100
