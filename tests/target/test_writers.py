"""A file that is written at positions: its bytes, its size, its end on the device, and writing in whole pages."""

import errno
import itertools
import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma4_moe.checkpoint.readers import PAGE, SLACK, allocate
from gemma4_moe.errors import StorageError
from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.target import writers as writer_module
from gemma4_moe.target.file_layout import layout_header
from gemma4_moe.target.writers import PageWriter, SafetensorsWriter
from support.direct_io import failing_after, works_here

HEADER, ENTRIES = layout_header([("a", FLOAT32, (64, 1024)), ("b", FLOAT32, (3, 7))], {"format": "pt"})
SIZE = ENTRIES[-1].end


@pytest.fixture
def arrays():
    rng = np.random.default_rng(5)
    return {entry.name: rng.standard_normal(entry.shape).astype(np.float32) for entry in ENTRIES}


def write(path, arrays):
    with SafetensorsWriter(path, HEADER, SIZE) as file:
        for entry in reversed(ENTRIES):
            file.write(entry.start, memoryview(arrays[entry.name]))
        file.write(SIZE, memoryview(b""))


def test_threads_write_one_file(tmp_path, arrays):
    a = ENTRIES[0]
    with SafetensorsWriter(tmp_path / "f", HEADER, SIZE) as file, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: file.write(a.start + row * 4096, memoryview(arrays["a"][row])), range(64)))
    assert (tmp_path / "f").read_bytes()[a.start : a.end] == arrays["a"].tobytes()


@pytest.mark.parametrize("most", [SIZE, 1000], ids=["whole writes", "writes of less than was asked"])
def test_safetensors_reads_what_was_written_at_positions(tmp_path, arrays, monkeypatch, most):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:most], offset))
    write(tmp_path / "f.safetensors", arrays)
    loaded = load_file(tmp_path / "f.safetensors")
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert (tmp_path / "f.safetensors").stat().st_size == SIZE


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_what_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        SafetensorsWriter(tmp_path / "f", HEADER, SIZE).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_blocks_are_reserved_at_once_or_the_size_set_where_the_filesystem_can_not(tmp_path, monkeypatch):
    calls = []

    def unsupported(descriptor, mode, offset, length):
        writer_module.ctypes.set_errno(errno.EINTR if not calls else errno.EOPNOTSUPP)
        calls.append((mode, offset, length))
        return -1

    monkeypatch.setattr(writer_module, "_fallocate", lambda: unsupported)
    with SafetensorsWriter(tmp_path / "hole", HEADER, 2**30):
        assert (tmp_path / "hole").stat().st_size == 2**30
        assert (tmp_path / "hole").stat().st_blocks * 512 < 2**20
    assert calls == [(0, 0, 2**30)] * 2
    monkeypatch.undo()
    with SafetensorsWriter(tmp_path / "reserved", HEADER, 2**24):
        assert (tmp_path / "reserved").stat().st_size == 2**24


def test_a_file_without_room_is_not_left_behind(tmp_path, monkeypatch):
    def full(*arguments):
        writer_module.ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(writer_module, "_fallocate", lambda: full)
    with pytest.raises(StorageError, match=r"can't reserve .* bytes: No space left") as caught:
        SafetensorsWriter(tmp_path / "f", HEADER, SIZE)
    assert caught.value.facts["file"] == str(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_never_touched(tmp_path):
    (tmp_path / "f").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("f", "link"):
        with pytest.raises(StorageError, match="can't create the file: File exists"):
            SafetensorsWriter(tmp_path / name, HEADER, SIZE)
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


def test_writing_outside_of_the_file_is_a_mistake_of_the_caller(tmp_path):
    with SafetensorsWriter(tmp_path / "f", HEADER, SIZE) as file:
        for offset in (-1, SIZE, SIZE - 3):
            with pytest.raises(ValueError, match="outside"):
                file.write(offset, memoryview(b"abcd"))
    assert (tmp_path / "f").stat().st_size == SIZE


def test_a_failed_fsync_is_the_files_last_word(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", failing_after(0, errno.EIO, calls.append))
    file = SafetensorsWriter(tmp_path / "f", HEADER, SIZE)
    descriptor = file.fileno()
    for call in (file.sync, file.sync, file.close, file.close):
        with pytest.raises(StorageError, match="can't bring the file to the disk: Input/output error"):
            call()
    assert calls == [], "it was synced again"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_close_syncs_and_an_error_in_the_block_abandons(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with SafetensorsWriter(tmp_path / "f", HEADER, SIZE) as file:
        descriptor = file.fileno()
        assert not os.get_inheritable(descriptor)
    file.close()
    assert synced == [descriptor]
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "g", HEADER, SIZE):
        raise KeyError
    assert synced == [descriptor]


CONTENT = random.Random(1).randbytes(10 * PAGE + 123)


def write_in_pieces(path, edges, *, buffered=False):
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
def test_a_writer_takes_pieces_of_any_size(edges, buffered, tmp_path):
    write_in_pieces(tmp_path / "out", edges, buffered=buffered)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_direct_writes_are_whole_pages_from_pages(tmp_path, monkeypatch):
    whole, calls = os.pwrite, []

    def seen(descriptor, content, offset):
        calls.append((offset, len(content)))
        return whole(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", seen)
    write_in_pieces(tmp_path / "out", [0, 1000, 3 * PAGE + 7, 10 * PAGE, len(CONTENT)])
    assert [call for call in calls if call[1]] == [
        (0, 1000), (1000, PAGE - 1000), (PAGE, 2 * PAGE), (3 * PAGE, 7),
        (3 * PAGE + 7, PAGE - 7), (4 * PAGE, 6 * PAGE), (10 * PAGE, 123),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1, 2])
def test_where_direct_writing_is_refused_it_goes_on_buffered(at, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing_after(at, errno.EINVAL, os.pwrite))
    if works_here(tmp_path):
        write_in_pieces(tmp_path / "out", EDGES[1])
        assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_write_that_stops_within_a_page_goes_on_buffered(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: whole(fd, bytes(view[: max(1, len(view) // 3)]), at))
    write_in_pieces(tmp_path / "out", EDGES[1], buffered=True)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_told(after, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing_after(after, errno.ENOSPC, os.pwrite))
    with pytest.raises(StorageError, match="can't write the file: No space"):
        write_in_pieces(tmp_path / "out", EDGES[1])
