"""Every exit status of the command: the list that `--help` prints, and the failure that leads to each."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import click

from gemma4_moe.errors import DifferenceError, Gemma4MoEError, InputError, StorageError, TargetBusyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
CLOSED_PIPE = 141
TERMINATED = 143

EXIT_STATUSES = {
    0: "done; verify, diff and demo: no difference",
    Gemma4MoEError.exit_status: "ranks disagree, a collective failed, or a defect of this program; "
    "torchrun ends so after any failure",
    UsageError.exit_status: "usage: an argument is missing or wrong, or DST may not be written as asked",
    InputError.exit_status: "input: a checkpoint is damaged, incomplete, or of a form that is not converted",
    DifferenceError.exit_status: "verify, diff or demo found a difference",
    StorageError.exit_status: "the disk, its permissions or the network refused",
    TargetBusyError.exit_status: "another process is writing DST",
    INTERRUPTED: "interrupted by Ctrl-C (SIGINT)",
    CLOSED_PIPE: "the program that reads stdout has ended, as head does",
    TERMINATED: "terminated (SIGTERM)",
}


class TerminatedError(BaseException):
    """SIGTERM was received."""


def terminate_by_exception() -> None:
    """Let SIGTERM raise a `TerminatedError`, so that contexts are left in order."""

    def terminate(_signal: int, _frame: object) -> NoReturn:
        raise TerminatedError

    signal.signal(signal.SIGTERM, terminate)


def status_of(run: Callable[[], int | None], *, as_json: bool = False) -> int:
    """Run a command and return the exit status; its error, if there is one, is printed on stderr.

    If `as_json`, an error of an argument, an input, a disk or ranks is printed on stdout too, as the field `error`.
    """
    try:
        status = run() or 0
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        if as_json:
            _print_json({"kind": type(error).__name__, "problem": error.format_message(), "next": "see --help"})
        return error.exit_code
    except Gemma4MoEError as error:
        message, status = f"error: {error}", error.exit_status
        if as_json:
            _print_json(failure(error))
    except (KeyboardInterrupt, click.Abort):
        message, status = "interrupted", INTERRUPTED
    except TerminatedError:
        message, status = "terminated", TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return CLOSED_PIPE
    except OSError as error:  # stdout can't be written, or the system refuses to look at a path
        message, status = f"error: {error}", StorageError.exit_status
    else:
        return status
    click.echo(f"gemma4-moe: {message}", err=True)
    return status


def failure(error: Gemma4MoEError) -> dict[str, object]:
    """Return an error as JSON: its class, the problem, the known facts and the next step."""
    return {"kind": type(error).__name__, "problem": error.problem, **error.facts, "next": error.hint}


def _print_json(error: dict[str, object]) -> None:
    with suppress(OSError):  # stdout may be what failed; stderr has the error
        click.echo(json.dumps({"error": error}, indent=1))


def end(status: int) -> NoReturn:
    """End the process; after an interrupt at once, although threads may still wait for the disk or the network."""
    if status in (INTERRUPTED, TERMINATED) and threading.active_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)  # the interpreter would first join the threads of the Hub's client
    sys.exit(status)
