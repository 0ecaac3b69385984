import json
import os

import pytest

from gemma4_moe.checkpoint.config import LARGEST_SIZE, LONGEST_CONFIG, read_config
from gemma4_moe.errors import ConfigError, StorageError
from support.sparse import REAL_MODEL


def write(directory, document):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (directory / "config.json").write_bytes(text)
    return read_config(directory)


def test_the_real_models_sizes():
    config = read_config(REAL_MODEL)
    assert (config.model_type, config.layers) == ("gemma4", 30)
    assert config.sizes == {"E": 128, "H": 2816, "I": 704}
    assert config.document == json.loads((REAL_MODEL / "config.json").read_text())
    assert config.path == REAL_MODEL / "config.json"


def test_a_text_only_config_has_its_sizes_at_the_top(tmp_path):
    config = write(tmp_path, {"model_type": "gemma4_text", "num_experts": 6, "num_hidden_layers": LARGEST_SIZE})
    assert (config.model_type, config.sizes, config.layers) == ("gemma4_text", {"E": 6}, LARGEST_SIZE)


def test_text_config_is_taken_alone_where_there_is_one(tmp_path):
    config = write(tmp_path, {"num_experts": 6, "hidden_size": 40, "text_config": {"hidden_size": 24}})
    assert (config.model_type, config.sizes) == (None, {"H": 24})


@pytest.mark.parametrize("field", ["num_experts", "hidden_size", "moe_intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize(
    "value", [0, -1, 10**9, 2**70, LARGEST_SIZE + 1, True, False, None, "6", 6.0, [6], {}, float("nan"), "\x1b[31m"]
)
def test_a_senseless_size_is_an_error_that_names_field_and_value(tmp_path, field, value):
    if (field, value) == ("num_experts", None):
        return  # a dense model's
    with pytest.raises(ConfigError, match=f"^{field} in config.json") as caught:
        write(tmp_path, {"text_config": {field: value}})
    assert caught.value.facts["expected"] == f"an integer from 1 to {LARGEST_SIZE}"
    assert type(value).__name__ in caught.value.facts["found"]
    assert "\x1b" not in str(caught.value)


NOT_JSON = [
    b"", b"{", b'{"a":1}}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 1_000_000, b'{"a":' * 100_000,
    b'{"num_experts": ' + b"9" * 10_000 + b"}",
]  # fmt: skip
REFUSED = {
    "^model_type": [{"model_type": 4}],
    "^text_config": [{"text_config": value} for value in (None, 3, "x", [])],
    "is not JSON": NOT_JSON,
    "is not an object": [b"[]", b"null", b"3", b'"x"', b"NaN"],
}


@pytest.mark.parametrize(("words", "document"), [(words, one) for words in REFUSED for one in REFUSED[words]])
def test_other_senseless_fields_and_documents_are_refused(tmp_path, words, document):
    with pytest.raises(ConfigError, match=words):
        write(tmp_path, document)


def test_a_dense_models_config_has_no_sizes_of_experts(tmp_path):
    dense = {"num_experts": None, "moe_intermediate_size": None, "hidden_size": 10}
    config = write(tmp_path, {"text_config": dense})
    assert (config.is_dense, config.sizes) == (True, {"H": 10})
    assert write(tmp_path, {"text_config": {"num_experts": 8, "enable_moe_block": False}}).is_dense
    assert not write(tmp_path, {"text_config": {"num_experts": 8}}).is_dense


def test_a_missing_config_and_one_that_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"can't be used: .* missing") as caught:
        read_config(tmp_path)
    assert caught.value.facts["file"] == str(tmp_path / "config.json")
    assert caught.value.hint is not None
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config(tmp_path)


def test_an_oversized_config_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="far larger") as caught:
        read_config(tmp_path)
    assert caught.value.facts["expected"] == f"at most {LONGEST_CONFIG} bytes"


def test_a_disk_that_fails_is_a_storage_error(tmp_path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(StorageError):
        read_config(tmp_path)
