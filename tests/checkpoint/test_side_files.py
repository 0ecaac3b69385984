import os

import pytest

from gemma4_moe.checkpoint.side_files import LARGEST_SIDE_FILE, check_side_file, is_side_file
from gemma4_moe.errors import CheckpointFormatError


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "chat_template.json", "other.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
        "processor_config.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.md",
    ],
)  # fmt: skip
def test_what_a_model_needs_is_taken_along(name):
    assert is_side_file(name)


@pytest.mark.parametrize(
    "name",
    [
        "modeling_gemma4.py", "chat_template.py", "LICENSE.py", "pytorch_model.bin", "tokenizer.pkl", "optimizer.pt",
        "NOTICE.safetensors", "model.safetensors", "model.safetensors.index.json", "LICENSE.PT", "training_args.bin",
        "other.json", "model.gguf", "Config.json", "run.sh", ".gitattributes", "gemma4_moe.json", "chat_template.so",
    ],
)  # fmt: skip
def test_code_pickles_weights_and_the_unknown_never_are(name):
    assert not is_side_file(name)


def test_a_side_file_is_a_regular_file_of_sensible_size(tmp_path):
    (tmp_path / "blob").write_text("x")
    (tmp_path / "README.md").symlink_to("blob")
    os.mkfifo(tmp_path / "LICENSE")
    (tmp_path / "vocab.json").symlink_to("/dev/zero")
    (tmp_path / "merges.txt").symlink_to("nowhere")
    for name, size in (("tokenizer.json", LARGEST_SIDE_FILE), ("tokenizer.model", LARGEST_SIDE_FILE + 1)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    for name in ("README.md", "tokenizer.json"):
        check_side_file(tmp_path / name)
    for name, found in (
        ("LICENSE", "a pipe"),
        ("vocab.json", "a device"),
        ("merges.txt", "a link that leads nowhere"),
        ("tokenizer.model", f"{LARGEST_SIDE_FILE + 1} bytes"),
    ):
        with pytest.raises(CheckpointFormatError) as caught:
            check_side_file(tmp_path / name)
        assert caught.value.facts["file"] == str(tmp_path / name)
        assert caught.value.facts["found"] == found
