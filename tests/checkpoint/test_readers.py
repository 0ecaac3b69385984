"""Reading in whole pages at any offset, with and without direct I/O, and in the quicker of two ways."""

import errno
import os
import random
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gemma4_moe import convert
from gemma4_moe.checkpoint import readers
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.readers import PAGE, SLACK, PageReader, QuickerReader, allocate
from gemma4_moe.errors import CheckpointFormatError, StorageError
from support.checkpoints import contents
from support.direct_io import failing_after, works_here

CONTENT = random.Random(1).randbytes(10 * PAGE + 123)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


RANGES = [
    (0, len(CONTENT)), (0, 1), (1, PAGE), (PAGE - 1, 2), (PAGE, PAGE), (5000, 0), (4097, 3 * PAGE),
    (10 * PAGE, 123), (10 * PAGE + 100, 23), (9 * PAGE + 7, PAGE + 116),
]  # fmt: skip


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_a_reader_returns_the_range_and_reads_around_it(file, offset, size, buffered):
    with OpenFile(file) as opened, closing(PageReader(opened, buffered=buffered)) as reader:
        found = reader.read(offset, size, allocate(size + SLACK))
        assert bytes(found) == CONTENT[offset : offset + size]


@pytest.mark.parametrize("buffered", [False, True])
def test_a_file_that_is_cut_off_is_told(file, buffered):
    with OpenFile(file) as opened, closing(PageReader(opened, buffered=buffered)) as reader:
        os.truncate(file, 3 * PAGE + 10)
        for offset, size in ((0, 4 * PAGE), (3 * PAGE, 11), (8 * PAGE, 5)):
            with pytest.raises(CheckpointFormatError, match="truncated"):
                reader.read(offset, size, allocate(size + SLACK))


def test_where_direct_reading_is_refused_it_goes_on_buffered(file, monkeypatch):
    if not works_here(file):
        pytest.skip("this filesystem has no direct I/O")
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        monkeypatch.setattr(os, "preadv", failing_after(1, errno.EINVAL, os.preadv))
        for offset, size in RANGES:
            assert bytes(reader.read(offset, size, allocate(size + SLACK))) == CONTENT[offset : offset + size]
        assert reader._direct is None


class Elsewhere:
    """A file that is not on this machine: it has no descriptor."""

    path = Path("elsewhere")

    def fileno(self):
        return -1

    def read_into(self, offset, destination):
        destination[:] = CONTENT[offset : offset + len(destination)]


@pytest.mark.parametrize("buffered", [False, True])
def test_a_file_without_a_descriptor_is_read_by_its_own_means(buffered):
    with closing(PageReader(Elsewhere(), buffered=buffered)) as reader:
        for offset, size in RANGES:
            assert bytes(reader.read(offset, size, allocate(size + SLACK))) == CONTENT[offset : offset + size]


def test_a_disk_that_fails_is_no_reason_to_go_on(file, monkeypatch):
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        monkeypatch.setattr(os, "preadv", failing_after(0, errno.EIO, os.preadv))
        with pytest.raises(StorageError, match="can't read the file: Input/output error"):
            reader.read(0, PAGE, allocate(PAGE + SLACK))


def test_without_proc_there_is_no_direct_io(file, monkeypatch):
    monkeypatch.setattr(readers.sys, "platform", "darwin")
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        assert bytes(reader.read(5, 10, allocate(10 + SLACK))) == CONTENT[5:15]
        assert reader._direct is None


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self):
        return self.now


@dataclass
class Way:
    """A reader that takes some seconds for each byte and fills what it reads with its letter."""

    letter: bytes
    seconds: float
    clock: Clock
    closed: int = 0
    offsets: list[int] = field(default_factory=list)

    def read(self, offset, size, buffer):
        self.clock.now += self.seconds * size
        self.offsets.append(offset)
        buffer[:size] = self.letter * size
        return buffer[:size]

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(("direct", "buffered", "kept"), [(1.0, 0.9, "b"), (0.9, 1.0, "d"), (1.0, 1.0, "d")])
def test_each_way_is_tried_twice_and_the_quicker_one_kept(direct, buffered, kept, monkeypatch):
    monkeypatch.setattr(readers, "TRIAL_BYTES", 30)
    clock = Clock()
    ways = Way(b"d", direct, clock), Way(b"b", buffered, clock)
    reader = QuickerReader(*ways, clock)
    buffer = memoryview(bytearray(16))
    read = [bytes(reader.read(10 * n, 10, buffer)) for n in range(20)]
    assert b"".join(letters[:1] for letters in read).decode() == "dddbbbdddbbb" + 8 * kept
    assert all(letters == letters[:1] * 10 for letters in read)
    assert sorted(ways[0].offsets + ways[1].offsets) == [10 * n for n in range(20)]
    reader.close()
    assert (ways[0].closed, ways[1].closed) == (1, 1)


def test_it_does_not_matter_that_one_way_has_read_more(monkeypatch):
    monkeypatch.setattr(readers, "TRIAL_BYTES", 30)
    clock = Clock()
    reader = QuickerReader(Way(b"d", 1.0, clock), Way(b"b", 1.5, clock), clock)
    buffer = memoryview(bytearray(100))
    for size in (29, 70, 31, 40):  # ways d, d, b, b: 99 bytes in 99 seconds, then 71 in 106.5
        reader.read(0, size, buffer)
    assert bytes(reader.read(0, 1, buffer)) == b"d"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trial", [1, 5_000])
def test_the_target_is_the_same_whichever_way_the_source_was_read(trial, source, tmp_path, monkeypatch):
    convert(source, tmp_path / "buffered", buffered=True)
    monkeypatch.setattr(readers, "TRIAL_BYTES", trial)
    convert(source, tmp_path / "nemo", max_memory=60_000)
    assert contents(tmp_path / "nemo") == contents(tmp_path / "buffered")
