"""Ctrl-C ends a command at once, however large its tensors are and however slow the disk is."""

import signal
import subprocess
import sys
import time

import pytest

from gemma4_moe import convert
from gemma4_moe.layout.dtypes import BFLOAT16
from support.checkpoints import config_of
from support.models import random_hf_state_dict
from support.sparse import write_sparse_checkpoint

#: Seconds within which a command has ended: far more than it takes, far less than what it was at.
BOUND = 2

#: The command, with a line on stderr once a thread reads a tensor. If it has seconds to wait, that read takes as long.
PROGRAM = """
import signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from gemma4_moe.checkpoint import file, readers
from gemma4_moe.cli import commands
seconds = float(sys.argv.pop(1))
def slow(read):
    def reading(*arguments):
        if threading.current_thread() is not threading.main_thread():
            sys.stderr.write("reading\\n")
            sys.stderr.flush()
            time.sleep(seconds)
        return read(*arguments)
    return reading
file.read_at = slow(file.read_at)
readers.PageReader.read = slow(readers.PageReader.read)
commands.main(sys.argv[1:])
"""


def interrupted(seconds, *arguments):
    """Interrupt the command while it reads; return the seconds that it took to end, and the rest of its stderr."""
    command = [sys.executable, "-c", PROGRAM, str(seconds), *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr.readline() == "reading\n"
        time.sleep(0.2)  # into the work
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        took = time.monotonic() - began
    assert process.returncode == 130, said
    return took, said.replace("reading\n", "").strip()


@pytest.mark.parametrize("command", ["convert hf new", "verify hf nemo", "diff hf hf", "verify nemo"])
def test_a_read_that_hangs_is_not_waited_for(command, source, tmp_path):
    convert(source, tmp_path / "nemo")
    name, *places = command.split()
    took, said = interrupted(30, name, *(tmp_path / place for place in places))
    assert said == "gemma4-moe: interrupted"
    assert took < BOUND


def test_a_large_tensor_is_not_compared_to_its_end(tmp_path):
    state = random_hf_state_dict(layers=1)
    E, H, I = 128, 2816, 1408  # noqa: E741
    enlarged = {"down_proj": [E, H, I], "gate_up_proj": [E, 2 * I, H], "per_expert_scale": [E]}
    shapes = {name: enlarged.get(name.rpartition(".")[2], list(tensor.shape)) for name, tensor in state.items()}
    for name in "ab":
        config = config_of(state, num_experts=E, hidden_size=H, moe_intermediate_size=I)
        write_sparse_checkpoint(tmp_path / name, shapes, BFLOAT16, config)
    took, said = interrupted(0, "diff", tmp_path / "a", tmp_path / "b")
    assert said == "gemma4-moe: interrupted"
    assert took < BOUND
