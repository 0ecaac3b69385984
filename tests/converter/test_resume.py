"""`--resume`: a run goes on where another has ended, or says why it can't; what is left over is seen and removed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError, SourceChangedError, UsageError
from gemma4_moe.target import journal
from gemma4_moe.target.recovery import clean
from support.checkpoints import contents, write_checkpoint
from support.interrupted import interrupt, resume
from support.models import random_hf_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, str]:
    convert(source, tmp_path / "undisturbed", max_shard_size=60_000)
    return contents(tmp_path / "undisturbed")


def test_it_writes_only_what_is_missing(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    interrupt(source, tmp_path / "nemo")
    total = sum(path.stat().st_size for path in (tmp_path / "undisturbed").glob("*.safetensors"))
    seen = resume(source, tmp_path / "nemo")
    assert seen[-1][0] == seen[-1][1] < total - 24_000
    assert contents(tmp_path / "nemo") == whole


def test_what_was_written_since_the_last_entry_is_not_lost_by_an_interrupt(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "FLUSH_BYTES", 2**30)
    interrupt(source, tmp_path / "nemo")
    seen = resume(source, tmp_path / "nemo")
    assert seen[-1][1] < sum(path.stat().st_size for path in (tmp_path / "nemo").glob("*.safetensors")) - 24_000
    assert contents(tmp_path / "nemo") == whole


def test_it_goes_on_again_and_again(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 20_000:
            raise KeyboardInterrupt

    runs = 0
    while not (tmp_path / "nemo").exists():
        runs += 1
        try:
            convert(source, tmp_path / "nemo", max_shard_size=60_000, max_memory=60_000, resume=True, progress=stop)
        except KeyboardInterrupt:
            assert runs < 10
    assert runs > 3
    assert contents(tmp_path / "nemo") == whole


def test_with_nothing_to_resume_it_starts_afresh(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    resume(source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == whole


def test_a_complete_identical_target_is_left_as_it_is(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before = (tmp_path / "undisturbed").stat().st_ino
    assert resume(source, tmp_path / "undisturbed") == []
    assert (tmp_path / "undisturbed").stat().st_ino == before
    assert contents(tmp_path / "undisturbed") == whole


@pytest.mark.parametrize("change", ["option", "source", "short"])
def test_a_complete_target_of_another_conversion_is_not_taken_for_it(
    change: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    other = source
    if change == "source":
        state = random_hf_state_dict(layers=2, E=6, H=40, I=24)
        other = write_checkpoint(tmp_path / "other", state, files=3)
    if change == "short":
        (tmp_path / "undisturbed/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(UsageError, match="the target exists"):
        resume(other, tmp_path / "undisturbed", max_shard_size=50_000 if change == "option" else 60_000)


def test_without_resume_an_unfinished_run_is_not_thrown_away(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "nemo")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="was not finished") as caught:
        convert(source, tmp_path / "nemo")
    assert "--resume" in str(caught.value)
    assert "gemma4-moe clean" in str(caught.value)
    now = contents(tmp_path)
    assert now.pop(".nemo.gemma4-moe/owner") == before.pop(".nemo.gemma4-moe/owner")
    assert now == before


def touched(source: Path) -> None:
    os.utime(source / "model-00001-of-00002.safetensors", ns=(1, 1))


def copied(source: Path) -> None:
    path = source / "model-00002-of-00002.safetensors"
    status, raw = path.stat(), path.read_bytes()
    other = path.with_name("copy")
    other.write_bytes(raw)
    path.unlink()
    other.rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (touched, "source model-00001-of-00002.safetensors mtime_ns was "),
        (copied, "source model-00002-of-00002.safetensors inode was "),
    ],
)
def test_another_source_is_not_mixed_in(
    change: Callable[[Path], None], words: str, source: Path, tmp_path: Path
) -> None:
    interrupt(source, tmp_path / "nemo")
    change(source)
    before = contents(tmp_path / ".nemo.gemma4-moe/out")
    with pytest.raises(UsageError, match="another one") as caught:
        resume(source, tmp_path / "nemo")
    assert words in caught.value.facts["found"]
    assert contents(tmp_path / ".nemo.gemma4-moe/out") == before


def test_other_options_are_named(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "nemo")
    with pytest.raises(UsageError, match="another one") as caught:
        resume(source, tmp_path / "nemo", dtype="float32")
    assert "options dtype was keep, is float32" in caught.value.facts["found"]


def test_a_block_that_is_not_what_the_journal_says_is_written_again(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    interrupt(source, tmp_path / "nemo")
    file = tmp_path / ".nemo.gemma4-moe/out/model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[9000] ^= 1
    file.write_bytes(raw)
    resume(source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == whole


@pytest.mark.parametrize("gone", ["missing", "short", "torn header", "stranger"])
def test_files_that_are_not_as_they_were_are_made_anew(
    gone: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    interrupt(source, tmp_path / "nemo")
    file = tmp_path / ".nemo.gemma4-moe/out/model-00001-of-00002.safetensors"
    if gone == "missing":
        file.unlink()
    elif gone == "short":
        os.truncate(file, 5000)
    elif gone == "torn header":
        with file.open("r+b") as opened:
            opened.write(bytes(100))
    else:
        file.with_name("stranger.safetensors").write_bytes(b"not ours")
    resume(source, tmp_path / "nemo")
    assert contents(tmp_path / "nemo") == whole


def test_a_source_that_gives_other_bytes_under_the_same_name_is_noticed(source: Path, tmp_path: Path) -> None:
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
    file = tmp_path / ".nemo.gemma4-moe/out/model-00001-of-00002.safetensors"
    file.unlink()
    with pytest.raises(SourceChangedError, match="other bytes than before"):
        resume(source, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()


def test_reading_an_unfinished_target_says_what_to_run(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "nemo")
    with pytest.raises(CheckpointFormatError, match="no such directory") as caught:
        open_checkpoint(tmp_path / "nemo")
    assert "--resume" in str(caught.value)
    assert f"gemma4-moe clean {tmp_path / 'nemo'}" in str(caught.value)


def test_clean_removes_what_is_left_and_nothing_else(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "nemo")
    before = contents(source)
    removed = clean(tmp_path / "nemo")
    assert removed is not None
    assert removed.nbytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert contents(source) == before
    assert clean(tmp_path / "nemo") is None


def test_clean_takes_a_tilde_for_the_home_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    interrupt(source, tmp_path / "nemo")
    found = clean("~/nemo")
    assert found is not None
    assert found.path == tmp_path / ".nemo.gemma4-moe"
    assert not found.path.exists()
