"""The files of a target: made whole, completed by all that stands beside the weights, and read back."""

import json

import pytest
from safetensors.numpy import load_file

from gemma4_moe.distributed.ranks import Ranks
from gemma4_moe.errors import CheckpointFormatError, ParallelError
from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.layout.table import Layout
from gemma4_moe.target import directory
from gemma4_moe.target.directory import TargetFiles
from gemma4_moe.target.file_layout import layout_files
from gemma4_moe.target.manifest import check_manifest, read_manifest
from gemma4_moe.target.pieces import piece_of
from support.checkpoints import flip_bit

FILES = layout_files([("a", FLOAT32, (3, 7)), ("b", FLOAT32, (11,))], 90, Layout.HF)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "out").mkdir()
    work = TargetFiles(tmp_path / "out", FILES, Ranks(), 10**6)
    work.make()
    return work


@pytest.fixture
def side_files(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{} of some length")
    (tmp_path / "NOTICE").write_bytes(b"")
    return [tmp_path / "config.json", tmp_path / "NOTICE"]


def written(work):
    """Fill each file behind its header, in two pieces."""
    pieces = []
    for number, file in enumerate(work.files):
        start, middle = len(file.header), (len(file.header) + file.size) // 2
        content = bytes([number + 1]) * (file.size - start)
        with (work.out / file.name).open("r+b") as opened:
            opened.seek(start)
            opened.write(content)
        pieces += [piece_of(file.name, start, content[: middle - start])]
        pieces += [piece_of(file.name, middle, content[middle - start :])]
    return pieces


def test_a_whole_directory(work, side_files, monkeypatch):
    monkeypatch.setattr(directory, "_COPY_BYTES", 6)
    work.read_back(work.complete(written(work), side_files, lambda _: {"options": {"x": 1}}))
    assert load_file(work.out / FILES[0].name)["a"].tobytes() == bytes([1]) * 84
    for path in side_files:
        assert (work.out / path.name).read_bytes() == path.read_bytes()
    manifest = read_manifest(work.out)
    assert manifest["options"] == {"x": 1}
    assert manifest["files"].keys() | {"gemma4_moe.json"} == {path.name for path in work.out.iterdir()}
    assert len(manifest["files"]["config.json"]["pieces"]) == 3
    assert manifest["files"]["NOTICE"]["bytes"] == 0
    assert check_manifest(work.out).wrong == ()


@pytest.mark.parametrize("change", [lambda pieces: pieces[1:], lambda pieces: [*pieces, pieces[0]]])
def test_a_hole_and_a_piece_too_many_are_refused(change, work, side_files):
    with pytest.raises(ParallelError, match="did not write every byte once") as caught:
        work.complete(change(written(work)), side_files, lambda _: {"options": {}})
    assert FILES[0].name in caught.value.facts["file"]
    assert not (work.out / "gemma4_moe.json").exists()


def test_what_is_there_is_kept_if_it_has_the_right_size_and_a_stranger_is_removed(work):
    written(work)
    inodes = {file.name: (work.out / file.name).stat().st_ino for file in FILES}
    flip_bit(work.out / FILES[0].name, 3)
    with (work.out / FILES[1].name).open("ab") as opened:
        opened.write(b"longer")
    (work.out / "stranger").write_text("x")
    work.make()
    assert {path.name for path in work.out.iterdir()} == inodes.keys()
    assert (work.out / FILES[0].name).read_bytes() == FILES[0].header + bytes([1]) * 84
    assert (work.out / FILES[0].name).stat().st_ino == inodes[FILES[0].name]
    assert (work.out / FILES[1].name).read_bytes() == FILES[1].header + bytes(44)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(format=1),
        lambda said: said.pop("options"),
        lambda said: said["files"]["NOTICE"].pop("pieces"),
        lambda said: said["files"]["NOTICE"].update(pieces=[]),
        lambda said: said["files"]["config.json"].update(bytes=18),
        lambda said: said["files"]["config.json"]["pieces"][0].__setitem__(0, 1),
        lambda said: said["files"]["config.json"]["pieces"][0].__setitem__(2, None),
        lambda said: said["files"]["config.json"]["pieces"][0].append(1),
        lambda said: said["files"]["config.json"].update(pieces=[[0, 20, "x"], [20, 17, "y"]]),
        lambda said: said.update(source={"files": []}),
        lambda said: said.update(source=3),
    ],
)
def test_a_manifest_of_another_form_is_refused(change, work, side_files):
    work.complete(written(work), side_files, lambda _: {"options": {}})
    said = json.loads((work.out / "gemma4_moe.json").read_text())
    change(said)
    (work.out / "gemma4_moe.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointFormatError, match="not a manifest that this version reads"):
        check_manifest(work.out)
