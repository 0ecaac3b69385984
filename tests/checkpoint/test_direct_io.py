"""Reading and writing in whole pages: the bytes are right at any offset, with and without direct I/O."""

from __future__ import annotations

import errno
import itertools
import os
import random
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from gemma4_moe.checkpoint import readers
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.readers import PAGE, SLACK, PageReader, allocate
from gemma4_moe.errors import CheckpointFormatError, StorageError
from gemma4_moe.target.writers import PageWriter, SafetensorsWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTENT = random.Random(1).randbytes(10 * PAGE + 123)


def works_here(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


RANGES = [
    (0, len(CONTENT)), (0, 1), (1, PAGE), (PAGE - 1, 2), (PAGE, PAGE), (5000, 0), (4097, 3 * PAGE),
    (10 * PAGE, 123), (10 * PAGE + 100, 23), (9 * PAGE + 7, PAGE + 116),
]  # fmt: skip


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_a_reader_returns_the_range_and_reads_around_it(file: Path, offset: int, size: int, buffered: bool) -> None:
    with OpenFile(file) as opened, closing(PageReader(opened, buffered=buffered)) as reader:
        found = reader.read(offset, size, allocate(size + SLACK))
        assert bytes(found) == CONTENT[offset : offset + size]


@pytest.mark.parametrize("buffered", [False, True])
def test_a_file_that_is_cut_off_is_told(file: Path, buffered: bool) -> None:
    with OpenFile(file) as opened, closing(PageReader(opened, buffered=buffered)) as reader:
        os.truncate(file, 3 * PAGE + 10)
        for offset, size in ((0, 4 * PAGE), (3 * PAGE, 11), (8 * PAGE, 5)):
            with pytest.raises(CheckpointFormatError, match="truncated"):
                reader.read(offset, size, allocate(size + SLACK))


def failing_after(calls: int, code: int, whole: Callable[..., int]) -> Callable[..., int]:
    seen: list[Any] = []

    def call(*arguments: Any) -> int:
        seen.append(arguments)
        if len(seen) == calls + 1:
            raise OSError(code, os.strerror(code))
        return whole(*arguments)

    return call


def test_where_direct_reading_is_refused_it_goes_on_buffered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not works_here(file):
        pytest.skip("this filesystem has no direct I/O")
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        monkeypatch.setattr(os, "preadv", failing_after(1, errno.EINVAL, os.preadv))
        for offset, size in RANGES:
            assert bytes(reader.read(offset, size, allocate(size + SLACK))) == CONTENT[offset : offset + size]
        assert reader._direct is None


def test_a_disk_that_fails_is_no_reason_to_go_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        monkeypatch.setattr(os, "preadv", failing_after(0, errno.EIO, os.preadv))
        with pytest.raises(StorageError, match="can't read the file: Input/output error"):
            reader.read(0, PAGE, allocate(PAGE + SLACK))


def write_in_pieces(path: Path, edges: list[int], *, buffered: bool = False) -> None:
    with SafetensorsWriter(path, b"", len(CONTENT)) as file, closing(PageWriter(file, buffered=buffered)) as writer:
        for start, end in itertools.pairwise(edges):
            buffer, lead = allocate(end - start + SLACK), start % PAGE
            buffer[:lead] = b"\xff" * lead  # whatever was in the buffer before
            buffer[lead : lead + end - start] = CONTENT[start:end]
            writer.write(start, buffer[lead : lead + end - start])
        writer.sync()


EDGES = [
    [0, len(CONTENT)],
    [0, PAGE, 5 * PAGE, 10 * PAGE, len(CONTENT)],
    [0, 1, 2, 3, 4000, 4095, 4096, 4097, 12_000, 12_001, len(CONTENT)],
    [*range(0, len(CONTENT), 1000), len(CONTENT)],
    [0, len(CONTENT) - 1, len(CONTENT)],
]


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("edges", EDGES)
def test_a_writer_takes_pieces_of_any_size(edges: list[int], buffered: bool, tmp_path: Path) -> None:
    write_in_pieces(tmp_path / "out", edges, buffered=buffered)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_direct_writes_are_whole_pages_from_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = os.pwrite, []

    def seen(descriptor: int, content: memoryview, offset: int) -> int:
        calls.append((offset, len(content)))
        return whole(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", seen)
    write_in_pieces(tmp_path / "out", [0, 1000, 3 * PAGE + 7, 10 * PAGE, len(CONTENT)])
    assert [call for call in calls if call[1]] == [
        (0, 1000), (1000, PAGE - 1000), (PAGE, 2 * PAGE), (3 * PAGE, 7),
        (3 * PAGE + 7, PAGE - 7), (4 * PAGE, 6 * PAGE), (10 * PAGE, 123),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1, 2])
def test_where_direct_writing_is_refused_it_goes_on_buffered(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing_after(at, errno.EINVAL, os.pwrite))
    if works_here(tmp_path):
        write_in_pieces(tmp_path / "out", EDGES[1])
        assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_write_that_stops_within_a_page_goes_on_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: whole(fd, bytes(view[: max(1, len(view) // 3)]), at))
    write_in_pieces(tmp_path / "out", EDGES[1], buffered=True)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", failing_after(1, errno.ENOSPC, os.pwrite))
    with pytest.raises(StorageError, match="can't write the file: No space"):
        write_in_pieces(tmp_path / "out", EDGES[1])


def test_without_proc_there_is_no_direct_io(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers.sys, "platform", "darwin")
    with OpenFile(file) as opened, closing(PageReader(opened)) as reader:
        assert bytes(reader.read(5, 10, allocate(10 + SLACK))) == CONTENT[5:15]
        assert reader._direct is None
