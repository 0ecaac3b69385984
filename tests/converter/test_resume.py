"""`--resume`: a run goes on where another has ended, or says why it can't; what is left over is seen and removed."""

import json
import os
from pathlib import Path

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError, SourceChangedError, UsageError
from gemma4_moe.target import journal
from gemma4_moe.target.recovery import clean
from support.checkpoints import contents, flip_bit
from support.interrupted import interrupt, resume

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def whole(source, tmp_path):
    convert(source, tmp_path / "undisturbed", max_shard_size=60_000)
    return contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("flush_bytes", [8192, 2**30], ids=["several entries", "one entry, at the interrupt"])
def test_it_writes_only_what_is_missing(flush_bytes, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "FLUSH_BYTES", flush_bytes)
    interrupt(source, tmp_path / "nemo")
    total = sum(path.stat().st_size for path in (tmp_path / "undisturbed").glob("*.safetensors"))
    assert 0 < resume(source, tmp_path / "nemo") < total - 24_000
    assert contents(tmp_path / "nemo") == whole


def test_with_nothing_to_resume_it_starts_afresh(source, whole, tmp_path):
    resume(source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == whole


def test_a_complete_identical_target_is_left_as_it_is(source, whole, tmp_path):
    before = (tmp_path / "undisturbed").stat().st_ino
    assert resume(source, tmp_path / "undisturbed") == 0
    assert (tmp_path / "undisturbed").stat().st_ino == before
    assert contents(tmp_path / "undisturbed") == whole


def test_without_resume_an_unfinished_run_is_not_thrown_away(source, tmp_path):
    interrupt(source, tmp_path / "nemo")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="was not finished") as caught:
        convert(source, tmp_path / "nemo")
    assert "--resume" in str(caught.value)
    assert "gemma4-moe clean" in str(caught.value)
    now = contents(tmp_path)
    assert now.pop(".nemo.gemma4-moe/owner") == before.pop(".nemo.gemma4-moe/owner")
    assert now == before


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda file: os.truncate(file, 5000),
        lambda file: flip_bit(file, 9000),  # a block that is not what the journal says
        lambda file: flip_bit(file, 40),  # the header
        lambda file: file.with_name("stranger.safetensors").write_bytes(b"not ours"),
    ],
)
def test_whatever_is_not_as_it_was_is_written_again(change, source, whole, tmp_path):
    interrupt(source, tmp_path / "nemo")
    change(tmp_path / ".nemo.gemma4-moe/out/nemo-00001-of-00002.safetensors")
    resume(source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == whole


def test_a_source_that_gives_other_bytes_under_the_same_name_is_noticed(source, tmp_path):
    interrupt(source, tmp_path / "nemo", after=15_000)
    (journal,) = (tmp_path / ".nemo.gemma4-moe").glob("journal-*")
    records = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    read = [facts["source"] for record in records for *_, facts in record.get("pieces", []) if "source" in facts]
    assert read, "nothing of the source was journalled"
    for path in source.glob("*.safetensors"):
        status, raw = path.stat(), bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = bytes(byte ^ 1 for byte in raw[start:])
        path.write_bytes(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    file = tmp_path / ".nemo.gemma4-moe/out/nemo-00001-of-00002.safetensors"
    file.unlink()
    with pytest.raises(SourceChangedError, match="other bytes than before"):
        resume(source, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()


def test_reading_an_unfinished_target_says_what_to_run(source, tmp_path):
    interrupt(source, tmp_path / "nemo")
    with pytest.raises(CheckpointFormatError, match="no such directory") as caught:
        open_checkpoint(tmp_path / "nemo")
    assert "--resume" in str(caught.value)
    assert f"gemma4-moe clean {tmp_path / 'nemo'}" in str(caught.value)


def test_clean_removes_what_is_left_and_nothing_else(source, tmp_path):
    interrupt(source, tmp_path / "nemo")
    before = contents(source)
    removed = clean(tmp_path / "nemo")
    assert removed is not None
    assert removed.nbytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert contents(source) == before
    assert clean(tmp_path / "nemo") is None


def test_clean_takes_a_tilde_for_the_home_directory(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    interrupt(source, tmp_path / "nemo")
    found = clean("~/nemo")
    assert found is not None
    assert found.path == tmp_path / ".nemo.gemma4-moe"
    assert not found.path.exists()
