"""A source that changes under a conversion: whichever of its facts it is, and whenever, there is no target."""

import pytest

from gemma4_moe import convert
from gemma4_moe.errors import SourceChangedError
from gemma4_moe.target import directory, journal
from support.changes import CHANGES, behind_its_time
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.models import random_hf_state_dict

FILE = "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=3))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["while it is read", "after its last block"])
def test_every_change_of_a_source_stops_the_run(when, change, source, tmp_path, monkeypatch):
    changed = []

    def while_it_is_read(done, total):
        if when == "while it is read" and not changed:
            changed.append(True)
            behind_its_time(change, source / FILE)

    copy_files = directory.copy_files

    def after_its_last_block(*arguments):
        if when == "after its last block":
            changed.append(True)
            behind_its_time(change, source / FILE)
        return copy_files(*arguments)

    monkeypatch.setattr(directory, "copy_files", after_its_last_block)
    with pytest.raises(SourceChangedError, match="changed while it was read") as caught:
        convert(source, tmp_path / "nemo", progress=while_it_is_read)
    assert changed
    assert caught.value.facts["file"] == str(source / FILE)
    assert caught.value.exit_status == 3
    assert not (tmp_path / "nemo").exists()
    assert (when == "while it is read") == ([path.name for path in tmp_path.iterdir()] == ["hf"])


def test_other_weights_under_the_same_header_are_noticed_by_their_time(source, tmp_path, monkeypatch):
    whole = journal.Ledger.flush
    monkeypatch.setattr(journal.Ledger, "flush", lambda ledger: (flip_bit(source / FILE, -1), whole(ledger)))
    with pytest.raises(SourceChangedError):
        convert(source, tmp_path / "nemo")
    assert contents(tmp_path).keys() == {"hf", *(f"hf/{path.name}" for path in source.iterdir())}
