"""What the command `verify` and `diff` can, the functions can: a target alone, Hub ids, sizes as text, `~`."""

import pytest

from gemma4_moe import convert, diff, inspect, plan, verify
from gemma4_moe.errors import CheckpointFormatError, UsageError
from support.checkpoints import flip_bit
from support.hub_server import COMMIT


def test_a_target_alone_is_checked_against_its_manifest(source, tmp_path):
    convert(source, tmp_path / "nemo")
    assert verify(tmp_path / "nemo").wrong == ()
    flip_bit(tmp_path / "nemo/nemo.safetensors", -1)
    (sentence,) = verify(tmp_path / "nemo").wrong
    assert sentence.startswith("nemo.safetensors: other bytes in ")
    with pytest.raises(CheckpointFormatError, match="has no manifest"):
        verify(source)
    for call in (verify, inspect):
        with pytest.raises(UsageError, match="a directory has no revision"):
            call(tmp_path / "nemo", revision="main")


def test_sizes_may_be_text(source, tmp_path):
    convert(source, tmp_path / "nemo")
    assert verify(source, tmp_path / "nemo", max_memory="64MiB").different == ()
    assert verify(tmp_path / "nemo", max_memory="64MiB").wrong == ()
    assert diff(source, source, max_memory="64MiB").different == ()
    for call in (lambda: verify(source, source, max_memory="much"), lambda: diff(source, source, max_memory="much")):
        with pytest.raises(UsageError, match="not a size"):
            call()


def test_hub_ids_are_read_from_the_cache(source, tmp_path, monkeypatch):
    repository = tmp_path / "hub/models--google--small-gemma"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    source.rename(repository / "snapshots" / COMMIT)
    for constant, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    convert("google/small-gemma", tmp_path / "nemo")
    assert verify("google/small-gemma", tmp_path / "nemo", revision="main").different == ()
    assert diff("google/small-gemma", "google/small-gemma").different == ()
    assert inspect("google/small-gemma").problems == ()


def test_a_tilde_is_the_home_directory(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "nemo")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verify("~/hf", "~/nemo").different == ()
    assert verify("~/nemo").wrong == ()
    assert diff("~/hf", source).different == ()
    assert inspect("~/hf").problems == ()
    assert plan("~/hf", "~/other").source_tensors == inspect(source).tensors
    with pytest.raises(CheckpointFormatError, match="no such directory"):
        inspect("~no-such-user/hf")
