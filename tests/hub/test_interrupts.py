"""Ctrl-C ends a command while the Hub's client downloads, however long its connections are silent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from support.checkpoints import write_checkpoint
from support.hub_server import environment, serving
from support.models import random_hf_state_dict

#: Seconds of silence of the server, and those within which a command has ended: far more than it takes.
SILENCE, BOUND = 6, 2

#: The command as it is installed. A background shell has the signal ignored.
PROGRAM = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import gemma4_moe.__main__"


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_download_is_not_waited_for(options, tmp_path):
    write_checkpoint(tmp_path / "published", random_hf_state_dict(layers=2, E=6, H=40, I=24))
    with serving("google/model", tmp_path / "published") as hub:
        hub.silent = SILENCE
        arguments = ["convert", "google/model", str(tmp_path / "nemo"), *options]
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=os.environ | environment(hub, tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while not any(asked is None for name, asked in hub.requests if name.endswith(".safetensors")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
            took = time.monotonic() - began
    assert process.returncode == 130
    assert said.splitlines()[-1] == "gemma4-moe: interrupted"
    assert "resume" not in said
    assert took < BOUND
    assert not (tmp_path / "nemo").exists()
