"""Commands that read a directory whose publish was interrupted: an error with a next command that works."""

import json
import shlex
import shutil

import pytest

from gemma4_moe import convert, diff, inspect, verify
from gemma4_moe.cli import commands
from gemma4_moe.errors import CheckpointFormatError, command_line
from gemma4_moe.target.recovery import OLD, OUT, PUBLISHING
from support.checkpoints import contents, write_checkpoint
from support.models import random_hf_state_dict

#: Each function that reads a checkpoint, and the directories that it is given.
READS = {
    "inspect": (inspect, ["nemo"]),
    "verify alone": (verify, ["nemo"]),
    "verify": (verify, ["hf", "nemo"]),
    "diff a": (diff, ["nemo", "copy"]),
    "diff b": (diff, ["copy", "nemo"]),
}


def interrupt_publish(target, state):
    """Leave a converted `target` as a kill would: before the last rename, or before the control directory went."""
    control = target.with_name(f".{target.name}.gemma4-moe")
    control.mkdir()
    inode = target.stat().st_ino
    if state == "between two renames":
        (control / OLD).mkdir()
        target.rename(control / OUT)
    (control / PUBLISHING).write_text(json.dumps({"inode": inode}))


@pytest.mark.parametrize("state", ["between two renames", "renamed"])
@pytest.mark.parametrize("read", READS)
def test_reading_changes_nothing_and_names_a_command_that_works(read, state, tmp_path):
    place = tmp_path / "a b"
    place.mkdir()
    source, target, copy = (place / name for name in ("hf", "nemo", "copy"))
    function, names = READS[read]
    directories = [place / name for name in names]
    write_checkpoint(source, random_hf_state_dict())
    convert(source, target)
    shutil.copytree(target, copy)
    interrupt_publish(target, state)
    before = contents(tmp_path)
    with pytest.raises(CheckpointFormatError, match="interrupted while it was published") as caught:
        function(*directories)
    assert contents(tmp_path) == before
    assert caught.value.hint == command_line("gemma4-moe", "clean", target), "no journal tells how it was begun"
    with pytest.raises(SystemExit) as ended:
        commands.main(shlex.split(caught.value.hint)[1:])
    assert ended.value.code == 0
    function(*directories)
    assert contents(target) == contents(copy)
    assert sorted(path.name for path in place.iterdir()) == ["copy", "hf", "nemo"]


def test_resume_ends_it_too(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict())
    convert(source, tmp_path / "nemo")
    interrupt_publish(tmp_path / "nemo", "between two renames")
    convert(source, tmp_path / "nemo", resume=True)
    assert verify(source, tmp_path / "nemo").different == ()
