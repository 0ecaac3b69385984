"""Reading back: one other byte in any file keeps the target from appearing, and it is the device that is read."""

import fcntl
import itertools
import json
import os
from pathlib import Path

import pytest

from gemma4_moe import convert
from gemma4_moe.errors import StorageError
from gemma4_moe.target.directory import TargetFiles
from support.checkpoints import contents, flip_bit
from support.direct_io import works_here

OPTIONS = {"max_shard_size": 60_000, "max_memory": 60_000}

pytestmark = pytest.mark.usefixtures("small_blocks")


def before_reading_back(monkeypatch, act):
    """Do something with the finished files once all is written, and before it is read back."""
    whole = TargetFiles.read_back

    def first_act(files, pieces, hashed):
        act(files.out)
        whole(files, pieces, hashed)

    monkeypatch.setattr(TargetFiles, "read_back", first_act)


def test_one_other_byte_of_any_file_is_found(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole", **OPTIONS)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir() if "gemma4_moe" not in path.name}
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert sizes.keys() - weights == {"config.json", "tokenizer.json"}
    files = json.loads((tmp_path / "whole/gemma4_moe.json").read_text())["files"]
    assert all(len(files[name]["pieces"]) > 5 for name in weights)
    for name, size in sizes.items():
        for position in {0, size // 2, size // 3, size - 1}:
            with monkeypatch.context() as patched:
                before_reading_back(patched, lambda out: flip_bit(out / name, position))  # noqa: B023 - called at once
                with pytest.raises(StorageError, match="gives back other bytes") as caught:
                    convert(source, tmp_path / "nemo", resume=True, **OPTIONS)
            start, end = next((start, end) for start, end, _ in files[name]["pieces"] if start <= position < end)
            assert caught.value.facts["found"].startswith(f"{name}: other bytes in ({start}, {end})"), position
            assert not (tmp_path / "nemo").exists()
    convert(source, tmp_path / "nemo", resume=True, **OPTIONS)
    assert contents(tmp_path / "nemo") == contents(tmp_path / "whole")


WORDS = ('"overflowed"', '"folded_scales"', '"plan"')
CHANGES = {
    "gone": Path.unlink,
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    **{word: lambda path, word=word: flip_bit(path, path.read_bytes().index(word.encode()) + 2) for word in WORDS},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("gemma4_moe.json", word) for word in WORDS),
        *itertools.product(
            ["nemo-00001-of-00002.safetensors", "config.json"],
            ["gone", "shorter", "longer"],
        ),
    ],
)
def test_a_file_that_is_gone_or_of_another_size_and_another_manifest_are_found(
    name, how, source, tmp_path, monkeypatch
):
    before_reading_back(monkeypatch, lambda out: CHANGES[how](out / name))
    with pytest.raises(StorageError, match="gives back other bytes") as caught:
        convert(source, tmp_path / "nemo", **OPTIONS)
    assert caught.value.facts["found"].startswith(f"{name}: {'other bytes in (0, ' if how in WORDS else ''}")
    assert not (tmp_path / "nemo").exists()


def test_without_reading_back_nothing_is_read_and_the_manifest_says_so(source, tmp_path, monkeypatch):
    before_reading_back(monkeypatch, lambda _: pytest.fail("it is read back all the same"))
    convert(source, tmp_path / "nemo", read_back=False, **OPTIONS)
    assert '"read_back": false' in (tmp_path / "nemo/gemma4_moe.json").read_text()


@pytest.mark.parametrize("buffered", [False, True])
def test_it_is_the_device_that_is_read(buffered, source, tmp_path, monkeypatch):
    """Past the page cache, or from a page cache that was told to forget the whole file first."""
    forgotten = set()
    direct = {}
    read, advise = os.preadv, os.posix_fadvise

    def name_of(descriptor):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def seen(descriptor, *others):
        name = name_of(descriptor)
        if "/out/" in name:
            assert name in forgotten, f"{name} is read as the page cache has it"
            direct[name] = direct.get(name, True) and bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        return read(descriptor, *others)

    def forget(descriptor, offset, size, advice):
        if (offset, size, advice) == (0, 0, os.POSIX_FADV_DONTNEED):
            forgotten.add(name_of(descriptor))
        advise(descriptor, offset, size, advice)

    def watch(_):
        monkeypatch.setattr(os, "preadv", seen)
        monkeypatch.setattr(os, "posix_fadvise", forget)

    before_reading_back(monkeypatch, watch)
    convert(source, tmp_path / "nemo", buffered=buffered, **OPTIONS)
    read_back = {name.rpartition("/")[2]: was_direct for name, was_direct in direct.items()}
    assert read_back.keys() == {path.name for path in (tmp_path / "nemo").iterdir()}
    assert set(read_back.values()) == {works_here(source / "config.json") and not buffered}
