import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import CheckpointFormatError, DuplicateTensorError, SourceChangedError, StorageError
from gemma4_moe.layout.dtypes import BFLOAT16
from support.descriptors import open_descriptors
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

A, B, C = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2, 3))
PLACES = {"a": A, "bb": A, "ccc": B}
INDEX = "model.safetensors.index.json"


def arrays(*names):
    return {name: np.arange(3 * len(name), dtype=np.float32).reshape(-1, 3) + 0.5 for name in names}


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture
def directory(tmp_path):
    """Two files, an index, side files, what is left behind, and what is ignored."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(arrays("a", "bb"), path / A)
    save_file(arrays("ccc"), path / B)
    write_index(path, PLACES)
    for name in ("config.json", "tokenizer.json", "README.md", "modeling.py", "training_args.bin"):
        (path / name).write_text("{}")
    for name in (".cache", "sub"):
        (path / name).mkdir()
        save_file(arrays("stale"), path / name / "stale.safetensors")
    return path


def test_a_checkpoint_of_two_files(directory):
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.path == directory
        assert list(checkpoint.files) == [A, B]
        assert {name: t.file.path.name for name, t in checkpoint.tensors.items()} == PLACES
        assert checkpoint.total_bytes == (1 + 2 + 3) * 3 * 4
        assert [path.name for path in checkpoint.side_files] == ["README.md", "config.json", "tokenizer.json"]
        assert checkpoint.skipped == ("modeling.py", "sub/", "training_args.bin")
        assert checkpoint.read_config().document == {}
        tensor = checkpoint.tensors["bb"]
        assert (tensor.name, tensor.dtype.name, tensor.shape, tensor.nbytes) == ("bb", "float32", (2, 3), 24)
        row = np.empty(3, np.float32)
        tensor.read_into(memoryview(row), 12)
        assert row.tolist() == [3.5, 4.5, 5.5]
        for offset in (-1, 16):
            with pytest.raises(ValueError, match="outside"):
                tensor.read_into(memoryview(row), offset)
        checkpoint.check_unchanged()
        (directory / B).unlink()
        with pytest.raises(SourceChangedError):
            checkpoint.check_unchanged()


def test_files_are_closed_at_the_end_and_after_an_error(directory):
    before = open_descriptors()
    open_checkpoint(str(directory)).close()
    (directory / B).write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match="too short"):
        open_checkpoint(directory)
    assert open_descriptors() == before


def test_a_single_file_needs_no_index_and_may_have_any_name(tmp_path):
    save_file(arrays("a"), tmp_path / "weights.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_links_into_a_blob_store_are_fine(directory):
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in directory.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    with open_checkpoint(directory) as checkpoint:
        assert len(checkpoint.tensors) == 3
        assert len(checkpoint.side_files) == 3


def link(path, to):
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


Bad = CheckpointFormatError
DAMAGES = [
    (lambda path: save_file(arrays("zz"), path / C), Bad, "that the index does not name", C),
    (lambda path: (path / B).unlink(), Bad, "names a file that is not there", A),
    (lambda path: [(path / x).unlink() for x in (A, B)], Bad, "names a file that is not there", "no safetensors file"),
    (lambda path: link(path / B, "nowhere"), Bad, "is missing", "a link that leads nowhere"),
    (lambda path: (path / INDEX).unlink(), Bad, "several safetensors files, and no index", f"{A}, {B}"),
    (
        lambda path: save_file(arrays("bb", "ccc"), path / B),
        DuplicateTensorError,
        "two files hold one tensor",
        f"{A} and {B}",
    ),
    (lambda path: write_index(path, PLACES | {"bb": B}), Bad, "disagree on where a tensor is", A),
    (lambda path: write_index(path, PLACES | {"dd": B}), Bad, "disagree on where a tensor is", "in no file"),
    (lambda path: write_index(path, {"a": A, "ccc": B}), Bad, "a tensor that the index does not name", None),
    (lambda path: pipe(path / B), Bad, "not a regular file", "a pipe"),
    (lambda path: pipe(path / INDEX), Bad, "not a regular file", "a pipe"),
    (lambda path: link(path / "LICENSE", "/dev/zero"), Bad, "not a regular file", "a device"),
    (lambda path: link(path / B, B), StorageError, "can't look at the file", None),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("damage", "error", "sentence", "found"), DAMAGES)
def test_files_and_index_that_disagree_are_refused(directory, damage, error, sentence, found):
    damage(directory)
    before = open_descriptors()
    with pytest.raises(error, match=sentence) as caught:
        open_checkpoint(directory)
    assert caught.value.facts.get("found") == found
    assert str(directory) in caught.value.facts["file"]
    assert open_descriptors() == before


def test_many_names_are_not_all_listed(directory):
    for number in range(100):
        (directory / f"x{number:03}.safetensors").touch()
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(directory)
    assert caught.value.facts["found"].endswith("x004.safetensors and 95 more")


def test_paths_that_are_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    save_file(arrays("a"), tmp_path / "one.safetensors")
    for name, sentence in (
        ("absent", "no such directory"),
        ("nul\0", "no such directory"),
        ("empty", "no safetensors file in the directory"),
        ("one.safetensors", "not a directory"),
    ):
        with pytest.raises(CheckpointFormatError, match=sentence) as caught:
            open_checkpoint(tmp_path / name)
        assert caught.value.hint is not None


@pytest.mark.parametrize("method", ["exists", "iterdir"])
def test_a_directory_that_may_not_be_read_is_a_storage_error(directory, monkeypatch, method):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as broken:
        broken.setattr(type(directory), method, refuse)
        with pytest.raises(StorageError, match="the directory: Permission denied"):
            open_checkpoint(directory)


def test_the_real_models_stand_in(tmp_path):
    weight_map = write_sparse_checkpoint(tmp_path / "real", real_names_and_shapes(), BFLOAT16, real_config())
    assert len(set(weight_map.values())) == 2
    began = time.process_time()
    with open_checkpoint(tmp_path / "real") as checkpoint:
        seconds = time.process_time() - began
        assert len(checkpoint.tensors) == 1013
        assert checkpoint.total_bytes == 51_611_872_412
        config = checkpoint.read_config()
        shape = checkpoint.tensors["model.language_model.layers.7.experts.down_proj"].shape
        assert shape == tuple(config.sizes[axis] for axis in "EHI")
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "real").iterdir()) < 2**21
    assert seconds < 0.5
