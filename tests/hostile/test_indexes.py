"""Indexes that lie: about names, types, places and sizes."""

import json
import os
import random

import pytest

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.index import INDEX_NAME, LONGEST_INDEX, parse_index
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError
from support.memory import memory_below

MUTANTS = int(os.environ.get("GEMMA4_MOE_FUZZ", "2000"))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "./x.safetensors", "..", ".", "", "x.bin",
        "a\\b.safetensors", "x\0.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "x.safetensors/",
        "config.json", "x.py", "~/x.safetensors", "file:///x.safetensors",
    ],
)  # fmt: skip
def test_a_place_that_is_no_safetensors_file_of_the_directory_is_refused(tmp_path, name):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointFormatError, match="names a place outside of its directory") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.facts["file"] == str(tmp_path / INDEX_NAME)
    assert (caught.value.facts["tensor"], caught.value.exit_status) == ("a", 3)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", "{}}", "\ufeff{}", '{"weight_map":null}', '{"weight_map":[]}', '{"metadata":NaN}',
        '{"weight_map":"x.safetensors"}', '{"weight_map":{"a":1}}', '{"weight_map":{"a":null}}',
        '{"weight_map":{"a":["x.safetensors"]}}', '{"weight_map":{"a":{"file":"x.safetensors"}}}',
        '{"weight_map":{"a":true}}', '{"weight_map":{"a":"\\ud800.safetensors"}}', '{"metadata":' + "[" * 100_000,
        '{"weight_map":{"\\udc00":"x.safetensors"}}', '{"weight_map":{"a":"x.safetensors"},}',
        '{"metadata":{"total_size":01},"weight_map":{"a":"x.safetensors"}}', '{"weight_map":{"a":"x.safetensors"}} x',
        '{"weight_map":{"a":"' + "x" * 5000 + '.safetensors"}}', '{"weight_map":' * 100_000,
        '{"weight_map":{"a":"x.safetensors"},"x":' + '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_map_from_text_to_text_is_refused(text):
    with pytest.raises(CheckpointFormatError):
        parse_index(text.encode(), file="i")


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(CheckpointFormatError, match="UTF-8"):
        parse_index(b'{"weight_map":{"\xff":"x.safetensors"}}', file="i")


def test_an_index_beyond_all_measure_is_not_read(tmp_path):
    with (tmp_path / INDEX_NAME).open("wb") as file:
        file.truncate(2**40)
    with memory_below(LONGEST_INDEX * 3 // 2), pytest.raises(CheckpointFormatError, match="far larger") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.facts["expected"] == f"at most {LONGEST_INDEX} bytes"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["{},", "[],", '"a",', "1,", '{"":'])
def test_megabytes_that_mean_nothing_end_soon_and_in_little_memory(unit):
    raw = ('{"metadata":[' + unit * (3_000_000 // len(unit))).encode()
    with memory_below(3 * len(raw)), pytest.raises(CheckpointFormatError):
        parse_index(raw, file="i")


def test_mutated_indexes_are_read_as_json_reads_them_or_refused():
    rng = random.Random(22)
    places = {"a.b": "x.safetensors", "c\n": "y.safetensors"}
    whole = json.dumps({"metadata": {"total_size": 3}, "weight_map": places}).encode()
    tokens = [
        *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\"),
        *(b"../", b"\\u002f", b"\\ud800", b"NaN", b"1", b"\x00", b"\xff", b""),
    ]
    accepted, refusals = 0, ""
    for _ in range(MUTANTS):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice([*tokens, bytes([rng.randrange(256)])])
        try:
            weight_map = parse_index(bytes(raw), file="i")
        except (CheckpointFormatError, DuplicateTensorError) as error:
            refusals += str(error)
            continue
        accepted += 1
        assert weight_map == json.loads(raw)["weight_map"]
        for name in weight_map.values():
            assert name == os.path.basename(name)  # noqa: PTH119 - an independent reading of what a bare name is
            assert name.endswith(".safetensors")
    assert accepted > MUTANTS // 50
    assert refusals.replace("\n", "").isprintable()
