"""Every failure ends with a status of the list that `--help` prints, and every status of the list comes out."""

import signal
import subprocess

import click
import pytest

from gemma4_moe import errors
from gemma4_moe.cli.exit_statuses import EXIT_STATUSES, TerminatedError, status_of
from gemma4_moe.errors import Gemma4MoEError
from support.command import COMMAND, run

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Gemma4MoEError)]

FAILURES = {
    **{error.__name__: (lambda error=error: error("it is wrong"), error.exit_status) for error in ERRORS},
    "usage of click": (lambda: click.UsageError("no such option"), 2),
    "SIGINT": (KeyboardInterrupt, 130),
    "click's abort": (click.Abort, 130),
    "SIGTERM": (TerminatedError, 143),
    "full disk under stdout": (lambda: OSError(28, "No space left on device"), 5),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_ends_with_its_status_and_the_status_is_listed(name, capsys):
    make, status = FAILURES[name]

    def fail():
        raise make()

    assert status_of(fail) == status
    assert status in EXIT_STATUSES
    assert capsys.readouterr().err


def test_nothing_and_a_difference():
    assert status_of(lambda: None) == 0
    assert status_of(lambda: errors.DifferenceError.exit_status) == 4


def test_a_closed_pipe_is_141(source):
    line = f"{' '.join(COMMAND)} inspect {source} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_defect_of_this_program_is_1():
    program = "from gemma4_moe.cli import commands\ncommands.cli.main = lambda *a, **k: 1 / 0\ncommands.main([])"
    assert "ZeroDivisionError" in run(program=program, status=1).stderr


def test_every_listed_status_is_one_of_these():
    listed = {0, 1, 141, *(status for _, status in FAILURES.values())}
    assert listed == EXIT_STATUSES.keys()


def test_a_shell_in_which_sigint_is_ignored_changes_nothing(source):
    subprocess.run(
        [*COMMAND, "inspect", source],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.DEVNULL,
        check=True,
    )
