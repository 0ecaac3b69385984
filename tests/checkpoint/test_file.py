import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4_moe.checkpoint.file import SafetensorsFile
from gemma4_moe.errors import CheckpointFormatError, SourceChangedError, StorageError, TensorShapeError
from support.changes import CHANGES, behind_its_time
from support.descriptors import open_descriptors
from support.direct_io import refusing
from support.headers import entry, raw_file


@pytest.fixture
def array():
    return np.random.default_rng(3).standard_normal((301, 1009)).astype(np.float32)


@pytest.fixture
def path(tmp_path, array):
    save_file({"t": array, "u": np.arange(7, dtype=np.uint8)}, tmp_path / "f.safetensors", {"format": "pt"})
    return tmp_path / "f.safetensors"


def start_of_t(file):
    (start,) = (entry.start for entry in file.header.entries if entry.name == "t")
    return start


def test_a_file_reads_any_range_as_it_stands(path, array):
    with SafetensorsFile(path) as file:
        start = start_of_t(file)
        rows = np.empty((5, 1009), np.float32)
        file.read_into(start + 17 * 1009 * 4, memoryview(rows))
        assert np.array_equal(rows, array[17:22])
        file.read_into(start, memoryview(np.empty((0, 4), np.float32)))
        assert file.size == path.stat().st_size


def test_threads_share_a_file(path, array):
    out = np.empty_like(array)
    with SafetensorsFile(path) as file, ThreadPoolExecutor(8) as pool:
        start = start_of_t(file)
        list(pool.map(lambda row: file.read_into(start + row * 1009 * 4, memoryview(out[row])), range(301)))
    assert np.array_equal(out, array)


def test_calls_that_return_less_than_asked_go_on(path, array, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:1000]], offset))
    with SafetensorsFile(path) as file:
        out = np.empty_like(array)
        file.read_into(start_of_t(file), memoryview(out))
    assert np.array_equal(out, array)


def test_identity_is_what_the_filesystem_says_and_the_headers_sha256(path):
    with SafetensorsFile(path) as file:
        status, start = path.stat(), file.header.data_start
        digest = hashlib.sha256(path.read_bytes()[:start]).hexdigest()
        identity = file.identity
        assert (identity.size, identity.mtime_ns, identity.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
        assert identity.header_digest == file.header.digest == digest
        file.check_unchanged()


def test_a_file_cut_off_while_it_or_its_header_is_read_is_an_error(path, monkeypatch):
    with SafetensorsFile(path) as file:
        os.truncate(path, file.size - 1000)
        out = bytearray(2000)
        with pytest.raises(CheckpointFormatError, match="truncated, or changed") as caught:
            file.read_into(file.size - 2000, memoryview(out))
        assert caught.value.facts["expected"].startswith("1000 more bytes")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointFormatError, match="truncated, or changed"):
        SafetensorsFile(path)


@pytest.mark.parametrize("in_time", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(path, change, in_time):
    with SafetensorsFile(path) as file:
        change(path) if in_time else behind_its_time(change, path)
        with pytest.raises(SourceChangedError) as caught:
            file.check_unchanged()
    assert caught.value.facts["file"] == str(path)
    assert caught.value.exit_status == 3


@pytest.mark.parametrize(("call", "words"), [("preadv", "can't read the file"), ("fstat", "can't look at the file")])
def test_a_disk_that_fails_is_a_storage_error_with_the_file(path, monkeypatch, call, words):
    with SafetensorsFile(path) as file, monkeypatch.context() as broken:
        broken.setattr(os, call, refusing(errno.EIO))
        with pytest.raises(StorageError, match=f"{words}: Input/output error") as caught:
            file.check_unchanged()
    assert caught.value.facts["file"] == str(path)
    assert caught.value.exit_status == 5


def test_the_descriptor_is_closed_at_the_end_and_after_a_refused_header(path, tmp_path):
    before = open_descriptors()
    file = SafetensorsFile(path)
    assert not os.get_inheritable(file.fileno())
    file.close()
    file.close()
    (tmp_path / "bad.safetensors").write_bytes(raw_file({"t": entry("U8", [3], 0, 4)}, bytes(4)))
    with pytest.raises(TensorShapeError):
        SafetensorsFile(tmp_path / "bad.safetensors")
    assert open_descriptors() == before


def test_every_truncation_of_a_small_file_is_refused(tmp_path):
    whole = raw_file({"t": entry("BF16", [3], 0, 6), "u": entry("F32", [0], 6, 6)}, b"abcdef")
    path = tmp_path / "f.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFormatError):
            SafetensorsFile(path)
    path.write_bytes(whole)
    SafetensorsFile(path).close()
