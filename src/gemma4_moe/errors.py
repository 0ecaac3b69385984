"""Every error that this package raises on purpose, with its exit status and the next step.

A message begins with one line that names the problem. One line follows for each known fact: the tensor, the file, the
expected and the found value, and the next step. Names from a checkpoint are made printable first, so that no file can
send control sequences to a terminal.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar


def printable(text: str) -> str:
    """Return `text` with every character that a terminal obeys or can't show as a backslash escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def command_line(*words: object) -> str:
    """Return a command for a hint, quoted so that a shell takes it as it is.

    If a `Path` begins with a dash, it is put after `--`, and the options that follow it are put before.
    """
    said = [str(word) for word in words]
    is_path = [isinstance(word, Path) for word in words]
    dashed = [text.startswith("-") for text in said]
    at = next((n for n, _ in enumerate(said) if is_path[n] and dashed[n]), len(said))
    if at < len(said) and "--" not in said:
        end = next((n for n in range(at, len(said)) if dashed[n] and not is_path[n]), len(said))
        said = [*said[:at], *said[end:], "--", *said[at:end]]
    return shlex.join(said)


class Gemma4MoEError(Exception):
    """The base class of all errors of this package.

    Attributes:
        facts: Label and value of each known fact, in the order of the message.
        hint: The next step, or None: that of this error, or else that of its class.
        exit_status: The status with which the command ends.
    """

    exit_status: ClassVar[int] = 1
    _usual_hint: ClassVar[str | None] = None

    def __init__(
        self,
        problem: str,
        *,
        tensor: str | None = None,
        file: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = printable(problem)
        labelled = {"tensor": tensor, "file": file, "expected": expected, "found": found}
        self.facts = {label: printable(str(value)) for label, value in labelled.items() if value is not None}
        hint = self._usual_hint if hint is None else hint
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.problem)

    def __str__(self) -> str:
        lines = self.facts | ({} if self.hint is None else {"next": self.hint})
        return "\n".join([self.problem, *(f"  {label}: {text}" for label, text in lines.items())])


class UsageError(Gemma4MoEError):
    """An argument has no meaning, or a request can't be met as it stands: the target exists, for example."""

    exit_status = 2
    _usual_hint = "call again with the expected value"


class UnfinishedRunError(UsageError):
    """An earlier run to the target was not finished, and this call does not resume it."""


class InputError(Gemma4MoEError, ValueError):
    """The input is not a Gemma 4 MoE checkpoint or state dict that this package understands."""

    exit_status = 3


class UnknownTensorError(InputError):
    """A name among those of the experts or the router that is none of the layout's names."""


class TensorShapeError(InputError):
    """A tensor whose shape or dtype is not the one that its name promises."""

    _usual_hint = "give a tensor of the expected shape and dtype"


class DuplicateTensorError(InputError):
    """Two entries with the name of one tensor, in one spelling or in two."""

    _usual_hint = "give each tensor once: remove all but one"


class IncompleteExpertsError(InputError, RuntimeError):
    """A layer that lacks one of its expert tensors."""


class UnsupportedCheckpointError(InputError):
    """A form of checkpoint that is recognised and not converted; `form` is its name, or None."""

    def __init__(self, problem: str, *, form: str | None = None, **facts: Any) -> None:
        self.form = form
        super().__init__(problem, **facts)


class CheckpointFormatError(InputError):
    """A file or directory that breaks the rules of safetensors or of its index."""

    _usual_hint = "get the file again, or save it again with the safetensors library"


class ConfigError(InputError):
    """A config.json that is missing, has values without meaning, or contradicts the tensors."""


class SourceChangedError(InputError):
    """A source file that changed while it was read."""


class DifferenceError(Gemma4MoEError):
    """Two checkpoints that should be equal are not."""

    exit_status = 4


class StorageError(Gemma4MoEError, OSError):
    """The disk, its permissions or the network refused: no space, no right, an input or output error."""

    exit_status = 5
    _usual_hint = "check the disk, the path and its permissions, then call again"


class TargetBusyError(Gemma4MoEError):
    """Another process is writing the same target."""

    exit_status = 6


class ParallelError(Gemma4MoEError, RuntimeError):
    """Ranks that disagree, an unknown mesh or placement, or a collective that failed."""
