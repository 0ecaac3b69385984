import json

import pytest

from gemma4_moe.checkpoint.json_scanner import DEEPEST_NESTING, LONGEST_NAME, MOST_SKIPPED, JsonScanner
from gemma4_moe.errors import CheckpointFormatError


def scanner(text: str | bytes) -> JsonScanner:
    return JsonScanner(text.encode() if isinstance(text, str) else text, file="f", what="document")


@pytest.mark.parametrize("value", ["", "a", 'quote " and \\', "tab\tand newline\n", "é 漢 𐀀", "\x7f", "\x00\x1f", "/"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_a_string_is_what_json_wrote(value, ensure_ascii):
    reading = scanner(json.dumps(value, ensure_ascii=ensure_ascii) + " \t\r\n")
    assert reading.string() == value
    reading.end()


@pytest.mark.parametrize(
    "text",
    [
        '"a',
        "a",
        '"\n"',
        '"\x00"',
        r'"\x41"',
        r'"\u12g4"',
        r'"\u12"',
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'"\ud800x"',
        "'a'",
    ],
)
def test_what_is_no_string_is_refused(text):
    with pytest.raises(CheckpointFormatError, match="character 0"):
        scanner(text).string()


@pytest.mark.parametrize("value", [0, 7, 10, 2**53 + 1, 2**63, 2**64 - 1])
def test_an_unsigned_integer(value):
    reading = scanner(f"{value} ")
    assert reading.unsigned() == value
    reading.end()


@pytest.mark.parametrize(
    "text",
    ["-0", "-1", "+1", "", "01", "00", "1.0", "1e2", "1E2", str(2**64), "9" * 5000, "NaN", "true", "null", '"1"', "٣"],
)
def test_what_is_no_unsigned_integer_is_refused(text):
    with pytest.raises(CheckpointFormatError, match="character 0"):
        scanner(text).unsigned()


def test_an_array_of_integers_is_no_longer_than_asked():
    assert scanner(" [ 1 , 2,3 ] ".strip()).unsigned_list(3) == (1, 2, 3)
    assert scanner("[]").unsigned_list(3) == ()
    for text in ("[1,2,3,4]", "[1,]", "[,1]", "[1 2]", "[1", "1", "[[1]]"):
        with pytest.raises(CheckpointFormatError):
            scanner(text).unsigned_list(3)


def test_an_object_gives_its_keys_in_order_twice_the_same_one_too():
    reading = scanner('{"b":1,"a" : 2,"b":3}')
    assert [(key, reading.unsigned()) for key in reading.members()] == [("b", 1), ("a", 2), ("b", 3)]
    reading.end()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a"}', '{"a":1', '{"a":1,}', "{,}", '{"a":1 "b":2}', "{1:1}"])
def test_what_is_no_object_is_refused(text):
    reading = scanner(text)
    with pytest.raises(CheckpointFormatError):
        [reading.unsigned() for _ in reading.members()]


def test_a_name_is_bounded_and_a_text_is_not():
    text = json.dumps("n" * LONGEST_NAME)
    assert len(scanner(text).name()) == LONGEST_NAME
    longer = json.dumps("n" * (LONGEST_NAME + 1))
    assert len(scanner(longer).string()) == LONGEST_NAME + 1
    with pytest.raises(CheckpointFormatError, match="character 0"):
        scanner(longer).name()


@pytest.mark.parametrize(
    "text",
    [
        "null", "true", "-0.5e-3", "1E+9", '"x"', "[]", "{}",
        "[[],{}]", '{"a":[1,{"b":null}],"c":{}}', '[1,"]",{"}":2}]',
        "[" * DEEPEST_NESTING + "]" * DEEPEST_NESTING, "[" + "1," * (MOST_SKIPPED - 2) + "1]",
    ],
)  # fmt: skip
def test_any_value_can_be_skipped(text):
    json.loads(text)
    reading = scanner(text + " ")
    reading.skip_value()
    reading.end()


@pytest.mark.parametrize(
    "text",
    [
        "", "]", "[1", "[1,]", "[,]", '{"a"}', '{"a":}', '{"a":1,}', "{1:2}", "[1}", "NaN", "-Infinity", "01", "1.",
        "+1",
        "[" * (DEEPEST_NESTING + 1) + "]" * (DEEPEST_NESTING + 1), "[" * 1_000_000,
        "[" + "1," * (MOST_SKIPPED - 1) + "1]",
        '{"a":' * 1_000_000, "tru",
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(text):
    reading = scanner(text)
    with pytest.raises(CheckpointFormatError):
        (reading.skip_value(), reading.end())


def test_bytes_that_are_not_utf8_are_refused():
    for raw in (b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"'):
        with pytest.raises(CheckpointFormatError, match="UTF-8"):
            scanner(raw)


def test_the_message_shows_the_place_and_a_little_of_what_stands_there():
    reading = scanner('{"a":' + "x" * 1000)
    with pytest.raises(CheckpointFormatError) as caught:
        [reading.unsigned() for _ in reading.members()]
    assert caught.value.problem.endswith("at character 5")
    assert caught.value.facts == {"file": "f", "expected": "an integer from 0 to 2^64 - 1", "found": "x" * 40}
