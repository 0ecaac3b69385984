import json

import pytest

from gemma4_moe.checkpoint.index import parse_index, write_index
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError

FILES = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors", "ä": "x.safetensors"}


def test_an_index_gives_each_tensor_its_file_whatever_else_it_says():
    document = {"metadata": {"total_size": 1.5e300, "more": [None, {"x": "\u0000"}]}, "weight_map": FILES, "x": -1}
    for text in (json.dumps(document), json.dumps(document, indent=4, ensure_ascii=False)):
        assert parse_index(text.encode(), file="i") == FILES


def test_the_same_tensors_give_the_same_index():
    written = write_index(FILES, 12345)
    assert written == write_index(dict(reversed(FILES.items())), 12345)
    assert json.loads(written) == {"metadata": {"total_size": 12345}, "weight_map": FILES}
    assert list(json.loads(written)["weight_map"]) == sorted(FILES)
    assert written.endswith(b"}\n")
    assert parse_index(written, file="i") == FILES


@pytest.mark.parametrize("text", ["{}", '{"weight_map":{}}', '{"metadata":{}}'])
def test_an_index_without_tensors_is_refused(text):
    with pytest.raises(CheckpointFormatError, match="names no tensor"):
        parse_index(text.encode(), file="i")


def test_a_tensor_in_two_places_and_a_second_map_are_refused():
    with pytest.raises(DuplicateTensorError) as caught:
        parse_index(b'{"weight_map":{"a":"x.safetensors","\\u0061":"y.safetensors"}}', file="i")
    assert caught.value.facts == {"tensor": "a", "file": "i"}
    with pytest.raises(CheckpointFormatError, match="one key twice"):
        parse_index(b'{"weight_map":{"a":"x.safetensors"},"weight_map":{}}', file="i")
