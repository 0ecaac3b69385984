"""Commands in hints: a shell takes them as they are, and with them the command that failed has its way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_moe import convert
from support.command import run


def hint_of(place, command, status):
    """The `next:` of a command that fails, typed in `place`."""
    name, *words = command.split()
    done = run(name, *words, cwd=place, status=status)
    return re.search(r"^  next: (.*)$", done.stderr, re.M)[1]


def shell(place, line):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=place, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def be_interrupted(place):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(place / "hf", place / "nemo", progress=stop)


def nest(place):
    (place / "run/epoch_0").mkdir(parents=True)
    shutil.move(place / "hf", place / "run/epoch_0/model")


def copy_a_shard(place):
    shutil.copy(place / "hf/model-00001-of-00002.safetensors", place / "hf/more of it.safetensors")


#: How a command comes to fail, that command, its status, and the command within its hint; whether it then works.
CASES = {
    "no parent": (lambda _: None, "convert hf a/b/nemo", 2, "(mkdir.*)", True),
    "a directory of checkpoints": (nest, "inspect run", 3, "(gemma4-moe.*)", False),
    "another file of weights": (copy_a_shard, "convert hf nemo", 3, "(mkdir.*)", True),
    "a target that is not finished, to resume": (be_interrupted, "inspect nemo", 3, "resume it: (.*?);", True),
    "a target that is not finished, to remove": (be_interrupted, "inspect nemo", 3, "remove it: (.*)", False),
    "layouts that differ": (lambda place: convert(place / "hf", place / "nemo"), "diff hf nemo", 3, "(.*)", False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_of_a_hint_works_as_printed(case, source, tmp_path):
    prepare, command, status, pattern, is_mended = CASES[case]
    prepare(tmp_path)
    hint = hint_of(tmp_path, command, status)
    line = re.search(pattern, hint)[1].replace("SRC", "hf")
    shell(tmp_path, line)
    if is_mended:
        run(*command.split(), cwd=tmp_path)
    if case.endswith("remove"):
        assert not list(tmp_path.glob(".nemo*"))
