"""What an import loads: the command line and the converter must answer without torch."""

import resource

import pytest

from support.command import run

HEAVY = ("torch", "transformers", "huggingface_hub", "triton", "nemo_automodel")


A_CONVERSION = """
import numpy as np
from gemma4_moe.kernels import transpose_scale_cast
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
assert transpose_scale_cast(x, scale=np.array([2, 3], np.float32))[1, 3, 2] == 69
"""


def loaded_by(program, packages=HEAVY):
    """The heavy packages that a fresh process has loaded after `program`."""
    report = f"import sys; print(*[name for name in {packages!r} if name in sys.modules])"
    return run(program=f"{program}\n{report}").stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "program",
    [
        "import gemma4_moe; gemma4_moe.__version__, dir(gemma4_moe)",
        "from gemma4_moe import cli",
        "from gemma4_moe import convert, plan, inspect",
        "from gemma4_moe import verify, diff",
        "from gemma4_moe import Gemma4MoEError",
        "from gemma4_moe.adapter import BackendConfig, MoEConfig, StateDictAdapter",
        "from gemma4_moe.layout import Layout",
        "import gemma4_moe.layout.table, gemma4_moe.layout.inventory, gemma4_moe.checkpoint.directory",
        "import gemma4_moe.kernels",
        "import gemma4_moe.demo.demo, gemma4_moe.demo.small_models",
        "from gemma4_moe.cli.commands import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code == 0",
        A_CONVERSION,
    ],
    ids=lambda program: program[:60],
)
def test_it_loads_nothing_heavy(program):
    assert loaded_by(program) == []


def test_opening_a_checkpoint_and_a_writer_loads_no_numpy_either(source):
    program = (
        f"from gemma4_moe.checkpoint.directory import open_checkpoint\nopen_checkpoint({str(source)!r}).close()\n"
        "import gemma4_moe.target.writers"
    )
    assert loaded_by(program, ("torch", "numpy", "safetensors")) == []


def test_help_takes_less_than_a_fifth_of_a_second():
    """Time of the processor: that of a clock depends on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 5 < 0.2


def test_the_adapter_loads_torch_and_nothing_else():
    assert loaded_by("from gemma4_moe import Gemma4MoEStateDictAdapter") == ["torch"]
