"""Pickles that would do something: refused before any of it is imported or run."""

import io
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.restricted_pickle import load
from gemma4_moe.errors import CheckpointFormatError
from support.memory import memory_below
from support.models import random_hf_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

#: A module that nothing imports, and that says so when it is imported.
NEVER = "this"


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_name(module, name, *arguments, protocol=4):
    """A pickle that calls module.name, whether it exists or not."""
    raw = pickle.dumps(arguments, protocol)[2:-1]
    if protocol < 4:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + raw + b"R."
    return (
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93" + raw + b"R."
    )


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "dcp"
    dcp.save(random_hf_state_dict(), storage_writer=FileSystemWriter(path), no_dist=True)
    return path


def attacks(marker):
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "a shell": pickle.dumps(Call(os.system, f"touch {marker}")),
        "a shell, old form": pickle.dumps(Call(os.system, f"touch {marker}"), 2),
        "eval": pickle.dumps(Call(eval, touch)),
        "exec, by name": by_name("builtins", "exec", touch),
        "a module that acts on import": by_name(NEVER, "s"),
        "a dotted name": by_name("torch.distributed.checkpoint.filesystem", "os.system", f"touch {marker}"),
        "another name of an allowed module": by_name("torch.distributed.checkpoint.filesystem", "FileSystem"),
        "torch.load": by_name("torch", "load", str(marker)),
        "a name like a dtype": by_name("torch", "float32.__class__", str(marker)),
        "pathlib's os": by_name("pathlib", "os.mkdir", str(marker)),
        "getattr": by_name("builtins", "getattr", "x", "y"),
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02Px\n.",
        "memory": b"\x80\x05\x96" + struct.pack("<Q", 2**46) + b".",
        "memory by a number": b"\x80\x04Nr" + struct.pack("<I", 2**31) + b".",
        "nothing": b"",
        "no pickle": b"\x00" * 100,
    }


@pytest.mark.parametrize("attack", attacks("marker"))
def test_metadata_that_would_act_is_refused_before(attack, directory, tmp_path):
    marker = tmp_path / "marker"
    (directory / ".metadata").write_bytes(attacks(marker)[attack])
    with memory_below(64 * 2**20), pytest.raises(CheckpointFormatError, match="not run"):
        open_checkpoint(directory)
    assert not marker.exists()
    assert NEVER not in sys.modules


@pytest.mark.parametrize("attack", ["a shell", "a module that acts on import", "torch.load"])
def test_a_part_that_would_act_is_refused_before(attack, directory, tmp_path):
    marker = tmp_path / "marker"
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn.endswith("down_proj"))
    path = directory / place.relative_path
    content = bytearray(path.read_bytes())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("archive/data.pkl", attacks(marker)[attack])
        made.writestr("archive/data/0", bytes(metadata.state_dict_metadata[index.fqn].size.numel() * 2))
    place.offset, place.length = len(content), len(archive.getvalue())
    path.write_bytes(bytes(content) + archive.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointFormatError, match="not run"):
        open_checkpoint(directory)
    assert not marker.exists()
    assert NEVER not in sys.modules


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a/b", "", ".metadata"])
def test_parts_are_beside_the_metadata_alone(name, directory, tmp_path):
    (tmp_path / "outside.distcp").write_bytes((directory / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointFormatError, match="outside of the directory"):
        open_checkpoint(directory)


def test_one_pickle_does_not_change_what_another_means(directory):
    state = (None, {"__setstate__": 5, "get": 6})
    classes = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    (directory / "other").write_bytes(b"")
    with pytest.raises(CheckpointFormatError):
        load(classes + pickle.dumps(state, 4)[2:-1] + b"b.", {}, file="x")
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.tensors


def test_torch_reads_the_same(directory):
    state = {name: torch.zeros_like(tensor) for name, tensor in random_hf_state_dict().items()}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    with open_checkpoint(directory) as checkpoint:
        for name, tensor in state.items():
            assert checkpoint.tensors[name].read().tobytes() == tensor.view(torch.uint8).numpy().tobytes()
